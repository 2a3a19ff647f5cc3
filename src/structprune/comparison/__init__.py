"""Several methods at several sparsities, each in a process of its own, in one table.

Read first: `run.py`, the table and what is still to do; then `cell.py`, one process. `shares.py` is a smaller sibling:
one method at several shares, for the outputs and not for a table.
"""
