"""What a sensitivity pass finds of each block, in files: in memory it would be lost with the process.

Shape suffixes: U units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.ranks import ALONE, Ranks
from structprune.runs.journal import Journal
from structprune.types import BlockLayout, UnitKind

SURVEY = "survey"
"""Folder of a run's own sensitivity pass."""
Costs = dict[str, list[Tensor]]
"""Kind -> per block, the loss that each removal adds, in the order of removal, shape (units,); empty without units."""


class SensitivityStore:
    """One sensitivity pass's folder and its journal, which is open inside the context."""

    def __init__(self, folder: Path, notify: Callable[[str], None], ranks: Ranks = ALONE) -> None:
        self.folder = folder
        self._notify = notify
        self._ranks = ranks

    def __enter__(self) -> SensitivityStore:
        self.journal = Journal(self.folder, self._notify, self._ranks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.journal.close()

    def has(self, block: BlockLayout) -> bool:
        """Whether the block's files are there and as they were written."""
        return self.journal.find(f"block {block.index}") is not None

    def save(self, block: BlockLayout, found: Mapping[str, Tensor], costs: Mapping[str, Tensor]) -> None:
        """Keep what the pruning pass will read of the block, and kind -> the cost of each removal."""
        self._ranks.broadcast(lambda: self._save(block, found, costs))

    def _save(self, block: BlockLayout, found: Mapping[str, Tensor], costs: Mapping[str, Tensor]) -> None:
        files = block_files(block, found, costs)
        for name, tensors in files.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / name)
        self.journal.record(f"block {block.index}", [self.folder / name for name in files])

    def costs(self, blocks: Sequence[BlockLayout], kinds: Sequence[UnitKind]) -> Costs:
        """Load the removal costs of all blocks."""
        return load_costs(self.folder, blocks, kinds)


def load_found(folder: Path, block: int) -> dict[str, Tensor]:
    """Load what was saved of one block for the pruning pass."""
    return load_file(folder / _found_name(block))


def load_costs(folder: Path, blocks: Sequence[BlockLayout], kinds: Sequence[UnitKind]) -> Costs:
    """Load the removal costs of all blocks."""
    per_block = [load_file(costs_path(folder, block.index)) for block in blocks]
    return {kind: [costs.get(kind, torch.empty(0)) for costs in per_block] for kind in kinds}


def block_files(
    block: BlockLayout, found: Mapping[str, Tensor], costs: Mapping[str, Tensor]
) -> dict[str, Mapping[str, Tensor]]:
    """Name the files of one block: what the pruning pass will read of it, and kind -> the cost of each removal."""
    return {_found_name(block.index): found, costs_name(block.index): costs}


def costs_path(folder: Path, block: int) -> Path:
    """Return the file of one block's costs, by kind."""
    return folder / costs_name(block)


def costs_name(block: int) -> str:
    """Return the name of that file in the folder of its pass."""
    return f"costs-{block}.safetensors"


def _found_name(block: int) -> str:
    return f"found-{block}.safetensors"
