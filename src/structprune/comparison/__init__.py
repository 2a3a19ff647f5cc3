"""Several methods at several sparsities, each in its own process, in one table."""
