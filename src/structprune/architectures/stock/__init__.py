"""Stock transformers classes, built on `meta` one module at a time and given their weights by name.

Read first: `model.py`, the blocks of a model; then `loading.py`, whole models.
"""
