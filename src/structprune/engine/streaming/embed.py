"""Opens hidden-state stores and fills them with the embedded windows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from structprune.architectures.stock.model import BlockInputs, StockModel
from structprune.calibration.store import FileStore, HiddenStore, MemoryStore
from structprune.engine.streaming.model import StreamedModel
from structprune.engine.streaming.propagate import Propagator
from structprune.memory import release_free_memory
from structprune.phases import Phase


def open_store(model: StreamedModel, path: Path, num_windows: int) -> HiddenStore:
    """Open a store for the hidden states of the run's first `num_windows` windows, as far as they are this rank's.

    It is in memory or in the file `path`, as the plan says; with several ranks each has its own file.
    """
    ranks = model.ranks
    shape = (ranks.num_local(num_windows), model.windows.ids_NS.shape[1], model.stock.layout.hidden_size)
    if model.plan.store == "memory":
        return MemoryStore(shape, model.dtype)
    own = path if ranks.size == 1 else path.with_name(f"{path.name}.{ranks.rank}")
    return FileStore(own, shape, model.dtype)


def embed(model: StreamedModel, targets: Mapping[HiddenStore, int]) -> Propagator:
    """Embed this rank's of the run's first so many windows into each store; see `embed_windows`."""
    with model.meter.phase(Phase.EMBED):
        return embed_own(model, targets)


def embed_own(model: StreamedModel, targets: Mapping[HiddenStore, int]) -> Propagator:
    """Embed as `embed` does, as part of whatever phase is measured."""
    ranks = model.ranks
    return embed_windows(
        model.stock,
        model.windows.ids_NS[ranks.rank :: ranks.size],
        {store: ranks.num_local(num_windows) for store, num_windows in targets.items()},
        model.plan.micro_batch_windows,
        device=model.device,
        dtype=model.dtype,
    )


def embed_windows(
    stock: StockModel,
    ids_NS: Tensor,
    targets: Mapping[HiddenStore, int],
    micro_batch: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Propagator:
    """Embed the first so many windows into each store; the embedding is in memory only meanwhile.

    Returns the micro-batch loop with the arguments that the stock model passes to its blocks.
    """
    tensors = {n: t.to(device) for n, t in stock.reader.read(stock.embedding_tensors(), dtype=dtype).items()}
    ids_NS = ids_NS.to(device)
    inputs: dict[int, BlockInputs] = {}
    for target, num_windows in targets.items():
        for start in range(0, num_windows, micro_batch):
            stop = min(start + micro_batch, num_windows)
            hidden_BSD, given = stock.embed(ids_NS[start:stop], tensors)
            target.write(start, hidden_BSD.cpu())
            inputs.setdefault(stop - start, given)
    if 1 not in inputs:
        # A rank may have no window at all.
        one_1S = ids_NS[:1] if len(ids_NS) else ids_NS.new_zeros(1, ids_NS.shape[1])
        inputs[1] = stock.embed(one_1S, tensors)[1]
    del tensors
    release_free_memory()
    return Propagator(inputs, micro_batch, device)
