"""The loss of a streamed model over its windows: one block in memory at a time, then the head alone.

Shape suffixes: N windows, S positions, D hidden size, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.calibration.store import HiddenStore
from structprune.engine.planning.shapes import LOGIT_TOKENS
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.embed import embed_own, open_store
from structprune.engine.streaming.model import StreamedModel
from structprune.memory import release_free_memory
from structprune.phases import PhaseName


def last_states(
    model: StreamedModel, path: Path, phase: PhaseName | None = None, advance: Callable[[str], None] = lambda text: None
) -> HiddenStore:
    """Stream the model over this rank's windows: their states behind the last block, in memory or in the file `path`.

    The peak is counted for `phase`, and `advance` hears of each block. Raises NumericalError for states that are not
    finite.
    """
    stretch: Callable[[], contextlib.AbstractContextManager[None]]
    stretch = contextlib.nullcontext if phase is None else partial(model.meter.phase, phase)
    num_windows = len(model.windows.ids_NS)
    store = open_store(model, path, num_windows)
    try:
        with stretch():
            propagator = embed_own(model, {store: num_windows})
        for block in model.stock.layout.blocks:
            with stretch():
                propagator.run(load_block(model, block)[1], block.index, store)
            release_free_memory()
            advance(f"block {block.index}")
    except BaseException:
        store.close()
        raise
    return store


@torch.no_grad()
def summed_loss(head: nn.Module, hidden_TD: Tensor, labels_T: Tensor) -> float:
    """Sum over tokens of the negative log-likelihood, a few logits at a time; may be NaN or infinite."""
    total = 0.0
    for start in range(0, len(hidden_TD), LOGIT_TOKENS):
        logits_TV = head(hidden_TD[start : start + LOGIT_TOKENS]).float()
        total += float(nn.functional.cross_entropy(logits_TV, labels_T[start : start + LOGIT_TOKENS], reduction="sum"))
    return total


def window_losses(head: nn.Module, store: HiddenStore, ids_NS: Tensor, device: torch.device) -> list[float]:
    """Compute `summed_loss` over the predictions within each of the windows whose last states are in `store`."""
    return [
        summed_loss(head, store.read(number, number + 1)[0, :-1].to(device), ids_S[1:].to(device))
        for number, ids_S in enumerate(ids_NS)
    ]


def summed_losses(head: nn.Module, store: HiddenStore, ids_NS: Tensor, device: torch.device) -> float:
    """Add them up over all windows."""
    return sum(window_losses(head, store, ids_NS, device))
