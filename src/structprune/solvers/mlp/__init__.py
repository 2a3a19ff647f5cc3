"""Iterative solvers of one pruned MLP: ADMM and alternating minimisation, on a sample of tokens.

Read first: `iterate.py`, the loop of all of them; then `updates.py`, the updates as pure functions.
"""
