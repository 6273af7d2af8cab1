"""One execution of a plan: its directory, journal and lock, and the walk from stage to stage."""
