"""Several processes that share one run, on torch.distributed; the only room that imports it.

Read first: `group.py`, the exchanges; then `heartbeat.py`, how a lost rank is noticed.
"""
