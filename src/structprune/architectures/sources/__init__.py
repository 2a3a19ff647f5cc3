"""Sources of a model: a directory, a hub id, a GGUF file or the bundled SmolLM2; the result is always a directory.

Read first: `resolve.py`.
"""
