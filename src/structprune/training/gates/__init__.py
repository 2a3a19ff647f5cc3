"""Which units stay, learned through the whole model before any block is cut.

Read first: `choose.py`, from the widths that an allocator chose to the units that stay; then `student.py`, a step.
"""
