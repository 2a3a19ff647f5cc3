"""The last hidden states of the reported windows: all that the end of a run needs of the pass over the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.ranks import ALONE, Ranks
from structprune.runs.journal import Journal

_STEP = "ends"


def save_final_states(journal: Journal, folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks = ALONE) -> None:
    """Record that the pass is over, with what it left."""

    def keep() -> None:
        path = _path(folder)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        journal.record(_STEP, [path])

    ranks.broadcast(keep)


def load_final_states(journal: Journal, folder: Path) -> dict[str, Tensor] | None:
    """Return what a finished pass left; None if it is not finished, or if that is damaged."""
    return None if journal.find(_STEP) is None else load_file(_path(folder))


def _path(folder: Path) -> Path:
    return folder / "ends.safetensors"
