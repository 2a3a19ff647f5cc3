"""`prune --gates`: what it may change, what it says, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from structprune import Recipe, prune
from structprune.results.report import PruneReport

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings = {"method": "structprune", "scope": "all", "sparsity": 0.4, "num_samples": 12, "seq_len": 32}
    common = {"calibration": str(text_file), "dtype": "float32", "multiple_of": 1, "sensitivity_samples": 4}
    gates = {"gates": "graspprune", "gates_steps": 12, "reload_check": False}
    return Recipe.build(**{**settings, **common, **gates, **changes})


def test_try(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = prune(tiny_llama, recipe(text_file), tmp_path / "out")
    print(report.gates)
    assert 0
