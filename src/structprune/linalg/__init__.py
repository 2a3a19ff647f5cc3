"""Linear algebra on plain tensors, in float64 where it decides: no model, no file.

Read first: `cholesky.py`, where a Gram matrix is made definite; then `obs.py`, greedy removal with exact updates.
"""
