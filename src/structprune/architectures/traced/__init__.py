"""Families without a file: what a stock causal model says of itself when it runs, and when one of its blocks is traced.

Read first: `family.py`, the description; then `surroundings.py`, what lies around the blocks, `widths.py`, config
entries by experiment, and `checks.py`, what has to hold before such a description is used.
"""
