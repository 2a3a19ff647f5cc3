"""A run's directory: the lock, the journal of finished steps, and the rename at the end.

Read first: `directory.py`; then `journal.py`.
"""
