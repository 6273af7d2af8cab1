"""What is trained: families and their modules, loading, adapters, groups."""
