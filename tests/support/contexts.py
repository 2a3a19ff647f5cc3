"""The context of a run on a tiny model, for steps that are tested by themselves."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch

from structprune.architectures.stock.model import StockModel
from structprune.calibration.context import CalibrationWindows
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.planning.plan import PrunePlan
from structprune.engine.run.context import RunContext
from structprune.methods import METHODS
from structprune.phases import Phase
from structprune.runs.directory import RunDirectory
from structprune.types import HeadUnits
from support.recipes import resolved_units

NUM_WINDOWS, SEQ_LEN = 3, 24


@functools.cache
def stock_of(directory: Path, head_units: HeadUnits) -> StockModel:
    """The model of a run, which makes a new module of each block; the tests share it as the steps of a run do."""
    return StockModel(CheckpointReader(directory), head_units)


def context_for(
    directory: Path, method: str = "structprune", head_units: HeadUnits = "kv-group", **changes: Any
) -> RunContext:
    stock = stock_of(directory, head_units)
    ids_NS = torch.randint(0, 250, (NUM_WINDOWS, SEQ_LEN), generator=torch.Generator().manual_seed(5))
    plan = PrunePlan(
        budget_bytes=2**30, phases={Phase.EMBED: 0}, store="memory", store_bytes=0, micro_batch_windows=2, disk_bytes=0
    )
    return RunContext(
        source="tiny",
        run=RunDirectory(directory.parent / "out"),
        stock=stock,
        recipe=resolved_units(
            method,
            **{"sensitivity_samples": NUM_WINDOWS, "damping": 1e-2, "head_units": head_units, **changes},
        ),
        method=METHODS.get(method),
        kinds=tuple(dict.fromkeys(g.kind for g in stock.groups)),
        plan=plan,
        calibration_name="test",
        windows=CalibrationWindows(ids_NS=ids_NS, description="test"),
        num_probe=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        started=time.perf_counter(),
    )
