"""Descriptions of GGUF architectures, by kind; `../table.py` collects them. Read first: `llama.py`."""
