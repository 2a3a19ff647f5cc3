"""A run, from recipe and headers to the finished checkpoint, with one decoder block in memory at a time.

Rooms, lowest first: `ranks/` processes that share a run; `planning/` bytes before work; `streaming/` hidden states
through one block; `run/` a run's inputs, identity and end; `layerwise/` one block's problem, decided and solved;
`passes.py` the one loop over blocks; `sensitivity/` what a removal costs the loss; `pipelines/` what runs on the loop.

Read first: `resolve.py`, what is decided before a weight is read; then `passes.py`; then `pipelines/units.py`, the pass
that most methods use.
"""
