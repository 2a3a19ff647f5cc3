"""A run, from recipe and headers to the finished checkpoint, with one decoder block in memory at a time.

Rooms, lowest first: `ranks/` processes that share a run; `planning/` bytes before work; `run/` a run's inputs,
identity and end; `streaming/` hidden states through one block; `layerwise/` one block's problem, decided and solved;
`sensitivity/` what a removal costs the loss; `passes.py` the one loop over blocks; `pipelines/` what runs on it.

Read first: `resolve.py`, what is decided before a weight is read; then `passes.py`; then `pipelines/units.py`, the pass
that most methods use.
"""
