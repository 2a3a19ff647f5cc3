"""Removable units of any module, from its graph: what shrinks together, and what cannot and why.

Read first: `graph.py`, from a module to its families; then `terms.py`, sizes as expressions; then `rules/shapes.py`, an
example of the rules of operations.
"""
