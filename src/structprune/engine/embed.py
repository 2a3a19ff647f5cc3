"""Opens hidden-state stores and fills them with the embedded windows."""

from __future__ import annotations

from pathlib import Path

from structprune.architectures.stock import BlockInputs
from structprune.calibration.store import FileStore, HiddenStore, MemoryStore
from structprune.engine.job import Streamed
from structprune.engine.propagate import Propagator
from structprune.memory import release_free_memory


def open_store(job: Streamed, path: Path, num_windows: int) -> HiddenStore:
    """Room for the hidden states of `num_windows` windows, in memory or in the file `path`, as the plan says."""
    shape = (num_windows, job.windows.ids_NS.shape[1], job.stock.layout.hidden_size)
    return MemoryStore(shape, job.dtype) if job.plan.store == "memory" else FileStore(path, shape, job.dtype)


def embed(job: Streamed, targets: dict[HiddenStore, int]) -> Propagator:
    """Embed the first so many windows into each store; the embedding is in memory only meanwhile.

    Returns the micro-batch loop with the arguments that the stock model passes to its blocks.
    """
    tensors = {n: t.to(job.device, job.dtype) for n, t in job.reader.read(job.stock.embedding_tensors()).items()}
    ids_NS = job.windows.ids_NS.to(job.device)
    inputs: dict[int, BlockInputs] = {}
    for target, num_windows in targets.items():
        for start in range(0, num_windows, job.plan.micro_batch_windows):
            stop = min(start + job.plan.micro_batch_windows, num_windows)
            hidden_BSD, given = job.stock.embed(ids_NS[start:stop], tensors)
            target.write(start, hidden_BSD.cpu())
            inputs.setdefault(stop - start, given)
    if 1 not in inputs:
        inputs[1] = job.stock.embed(ids_NS[:1], tensors)[1]
    del tensors
    release_free_memory()
    return Propagator(inputs, job.plan.micro_batch_windows, job.device)
