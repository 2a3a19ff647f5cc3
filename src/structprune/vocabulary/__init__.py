"""Fewer tokens: which ones stay, and every file that counts them rewritten.

Read first: `kept.py`, what is decided; then `model.py`, what each kind of tokenizer needs to stay whole; `choose.py`,
which tokens are worth a row; `files.py` and `ids.py`, what moves with them.
"""
