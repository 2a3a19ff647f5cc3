"""Memory, disk and widths of a run, computed from shapes before any weight is read.

Read first: `plan.py`, the question and the answer; then `host.py`, the bytes of each phase and what gives way.
"""
