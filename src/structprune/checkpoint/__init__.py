"""Hugging Face checkpoints on disk: read by name from headers, written shard by shard. No model is known here.

Read first: `reader.py`; then `writer.py`.
"""
