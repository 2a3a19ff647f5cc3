"""The search over widths: which choices are measured on the model, and how.

Read first: `run.py`, the search from the first proposal to the final judgement; then `variants.py`, what a candidate
consists of, and `fitness.py`, how many of them are measured together.
"""
