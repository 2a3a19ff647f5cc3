"""GGUF files for llama.cpp: planned from headers, then written tensor by tensor.

Read first: `families.py`, which architecture of llama.cpp holds which family; then `plan.py` and `export.py`.
"""
