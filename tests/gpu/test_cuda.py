"""On a CUDA device: the same units as on the CPU, and a budget that is kept. Run with `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune import Recipe, prune
from structprune.api import plan
from structprune.errors import MemoryBudgetError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def recipe(text: Path, **changes: Any) -> Recipe:
    common = {"calibration": str(text), "num_samples": 5, "seq_len": 32, "dtype": "float32", "multiple_of": 1}
    return Recipe.build(**{"device": "cuda", **common, **changes})


def kept(output: Path) -> Any:
    return json.loads((output / "pruning_manifest.json").read_text())["kept_indices"]


@pytest.mark.parametrize("method", ["fasp", "structprune", "flap", "llm-pruner", "slicegpt", "depth"])
def test_a_tiny_model_within_its_plan(method: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    changes = {} if method not in ("slicegpt", "depth") else {"multiple_of": None}
    report = prune(tiny_llama, recipe(text_file, method=method, **changes), tmp_path / "cuda")
    assert report.memory.device is not None
    assert 0 < report.memory.device.measured_peak_bytes <= report.memory.device.planned_peak_bytes
    if method in ("fasp", "flap"):
        prune(tiny_llama, recipe(text_file, method=method, device="cpu", **changes), tmp_path / "cpu")
        assert kept(tmp_path / "cuda") == kept(tmp_path / "cpu")


@pytest.mark.realmodel
@pytest.mark.parametrize("method", ["fasp", "structprune"])
def test_the_real_model_within_a_budget(method: str, smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    settings = recipe(
        shared_data / "wikitext2" / "train-1mb.raw.txt", method=method, num_samples=24, seq_len=1024, dtype="bfloat16"
    )
    found = plan(smollm2, settings).plan.device
    assert found is not None
    # No more than the plan says is needed: the limit is real, so more would end the run.
    budget = found.peak_bytes
    report = prune(smollm2, settings.model_copy(update={"device_memory": budget}), tmp_path / "out")
    assert report.memory.device is not None
    assert report.memory.device.measured_peak_bytes <= budget
    assert report.memory.device.planned_peak_bytes <= 1.25 * report.memory.device.measured_peak_bytes
    with pytest.raises(MemoryBudgetError, match="device's memory budget"):
        prune(smollm2, settings.model_copy(update={"device_memory": 2**20}), tmp_path / "none")
