"""The loops over blocks by name: `units`, `depth`, `experts` and `slice`. A method names its pipeline.

Read first: `registry.py`, what a pipeline states; then `units.py`.
"""
