"""Several methods at several sparsities, each in a process of its own, in one table.

Read first: `run.py`, the table and what is still to do; then `cell.py`, one process.
"""
