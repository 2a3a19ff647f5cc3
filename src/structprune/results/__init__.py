"""Results as data: what runs, comparisons, evaluations and recoveries found. JSON on disk, drawn by `report/`.

Read first: `schema.py`, the report of one pruning run.
"""
