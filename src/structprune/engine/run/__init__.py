"""One run's life: its inputs, what makes two runs the same, the calibration windows, its end and the reload check.

Read first: `context.py`; then `identity.py` and `finalize.py`.
"""
