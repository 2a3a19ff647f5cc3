"""What the end of a run needs of a pass over the blocks, such as the last hidden states of the reported windows.

Shape suffixes: N windows, S positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.calibration.store import HiddenStore
from structprune.ranks import ALONE, Ranks
from structprune.runs.journal import Journal

FINAL_STEP = "ends"


def save_final_states(
    journal: Journal, tensors: Mapping[str, Tensor], ranks: Ranks = ALONE, step: str = FINAL_STEP
) -> None:
    """Record that the pass is over, with what it left."""

    def keep() -> None:
        path = _path(journal, step)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
        journal.record(step, [path])

    ranks.broadcast(keep)


def load_final_states(journal: Journal, step: str = FINAL_STEP) -> dict[str, Tensor] | None:
    """Return what a finished pass left; None if it is not finished, or if that is damaged."""
    return None if journal.find(step) is None else load_file(_path(journal, step))


def first_windows(ranks: Ranks, store: HiddenStore, num_windows: int) -> Tensor:
    """Read the hidden states (N, S, D) of the run's first windows, on every rank."""
    windows = [
        ranks.broadcast_window(number, lambda own: store.read(own, own + 1).clone()) for number in range(num_windows)
    ]
    return torch.cat(windows)


def _path(journal: Journal, step: str) -> Path:
    return journal.folder / f"{step}.safetensors"
