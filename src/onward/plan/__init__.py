"""What the user asked for: the plan's schema, loading with line numbers, overrides, the lock, what a change means."""
