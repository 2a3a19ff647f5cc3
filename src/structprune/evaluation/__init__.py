"""Measurements of finished models: perplexity, zero-shot tasks, speed, and whether stock code loads them.

Read first: `perplexity.py`; then `reload.py`, the check that every output passes.
"""
