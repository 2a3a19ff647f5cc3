"""GGUF architectures as data: what each is in transformers, one description for reading files and for writing them.

A description says which tensors a block has in either world and what happens to each (`rules.py`), and which keys of
the file say what the config says (`entries.py`), both ways. A new architecture is one entry of the tables in
`families/`. Read first: `description.py`, then `families/llama.py`.
"""
