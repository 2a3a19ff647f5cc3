"""A model whose blocks are streamed over token windows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch

from structprune.architectures.stock.model import StockModel
from structprune.calibration.context import CalibrationWindows
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.planning.plan import PrunePlan
from structprune.memory import PeakMeter
from structprune.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedModel:
    """What embedding, propagation and writing need: a run of `prune` is built on it, and recovery has two of it."""

    stock: StockModel
    windows: CalibrationWindows
    """All windows of the run; stores and loops have those of this rank."""
    plan: PrunePlan
    device: torch.device
    dtype: torch.dtype
    """The dtype of the forward passes."""
    meter: PeakMeter = field(default_factory=PeakMeter)
    """Where the peaks of the phases are put down."""
    ranks: Ranks = ALONE
    """The processes that share the windows."""

    @property
    def reader(self) -> CheckpointReader:
        """The source's tensors, under the names of the stock modules."""
        return self.stock.reader

    def on_windows(self, numbers: tuple[int, ...]) -> Self:
        """Return the same model with these windows only."""
        windows = replace(self.windows, ids_NS=self.windows.ids_NS[list(numbers)])
        return replace(self, windows=windows)
