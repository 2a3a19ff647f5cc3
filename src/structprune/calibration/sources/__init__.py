"""One file per origin of calibration text: a file, the hub, BoolQ passages, or text sampled from the model.

Read first: `file.py`, the shortest one.
"""
