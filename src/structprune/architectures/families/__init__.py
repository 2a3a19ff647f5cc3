"""One file per model family: names of the stock modules, and the unit groups of one block.

Read first: `llama.py`; then `common.py`, the groups that families share.
"""
