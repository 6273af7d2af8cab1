"""Everything needed to continue exactly: the format, how it is committed, read, verified and retired."""
