"""One sublayer of one block: sums over the calibration windows, the choice of units, the new weights.

Read first: `block.py`, the order of these steps; then `solve.py`, the choice and the solution of one unit group.
"""
