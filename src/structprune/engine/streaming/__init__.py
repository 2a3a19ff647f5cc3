"""Hidden states through one block: embed, run, differentiate, move between host and device, evaluate.

Read first: `propagate.py`, one block over all windows; then `backward.py`, its gradient.
"""
