"""GGUF files for llama.cpp: planned from headers, then written tensor by tensor.

Which architecture of llama.cpp holds which family is one table for readers too: architectures/gguf.
Read first: `plan.py`, then `export.py`.
"""
