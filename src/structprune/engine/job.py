"""One run's inputs, decided and checked before the first weight is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from structprune.architectures.stock import StockModel
from structprune.calibration.context import CalibrationWindows
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.planner import PrunePlan
from structprune.methods.method import Method
from structprune.recipe import Recipe
from structprune.types import BlockLayout, UnitGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that a run needs. The recipe is resolved: no entry is None."""

    source: str
    reader: CheckpointReader
    stock: StockModel
    recipe: Recipe
    method: Method
    kinds: tuple[str, ...]
    """Unit kinds in scope."""
    plan: PrunePlan
    calibration_name: str
    windows: CalibrationWindows
    num_probe: int
    """Windows whose perplexity is reported, dense and pruned."""
    device: torch.device
    dtype: torch.dtype
    started: float
    """`time.perf_counter()` at the start of the run."""

    def groups(self, block: BlockLayout) -> tuple[UnitGroup, ...]:
        """The groups in scope of one block; blocks of an unevenly pruned source differ."""
        return tuple(block.group(kind) for kind in self.kinds)

    @property
    def damping(self) -> float:
        """The recipe's damping, resolved from the method's where it was not given."""
        assert self.recipe.damping is not None
        return self.recipe.damping

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states of all windows are kept beside the pruned ones."""
        return self.recipe.target == "dense-path"
