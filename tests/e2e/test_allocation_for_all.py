"""Allocators that compare blocks take their removal costs from a sensitivity pass, whatever method then chooses the
units.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import structprune
from structprune.errors import UnsupportedError
from structprune.recipe import Recipe
from structprune.results.report import PruneReport

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(source: Path, output: Path, text_file: Path, method: str, **changes: Any) -> PruneReport:
    recipe = Recipe.build(
        method=method,
        calibration=str(text_file),
        num_samples=8,
        seq_len=32,
        dtype="float32",
        multiple_of=1,
        **changes,
    )
    return structprune.prune(source, recipe, output)


def widths(report: PruneReport) -> list[int]:
    return [block.kept_units for block in report.blocks]


def kept(output: Path) -> Any:
    return json.loads((output / "pruning_manifest.json").read_text())["kept_indices"]


def settings_of(allocator: str) -> dict[str, Any]:
    return {"allocator": allocator, "temperature": 0.3 if allocator == "energy" else 0.0}


@pytest.fixture(scope="module")
def wanted(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[int]]:
    """The widths of structprune with an allocator, found once."""
    root = tmp_path_factory.mktemp("wanted")

    @functools.cache
    def of(allocator: str) -> list[int]:
        changes = settings_of(allocator)
        return widths(pruned(tiny_llama, root / allocator, text_file, "structprune", damping=1e-2, **changes))

    return of


@pytest.mark.parametrize("allocator", ["closed-form", "energy", "softmax"])
@pytest.mark.parametrize("method", ["fasp", "wanda-sp", "osscar", "spap", "flap", "random"])
def test_widths_are_those_of_structprune(
    method: str,
    allocator: str,
    wanted: Callable[[str], list[int]],
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    """Prices are measured with the decision's ridge, so it is the same for both here."""
    changes = settings_of(allocator)
    if method != "spap":  # its solver wants the ridge of its own, and decides with the same one then
        changes["damping"] = 1e-2
    report = pruned(tiny_llama, tmp_path / "out", text_file, method, **changes)
    assert widths(report) == wanted(allocator)
    assert sum(widths(report)) == 2 * 48 - 29


def test_the_method_chooses_without_the_survey(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Greedy removal in osscar stays in units of the output, though the sensitivity pass's sensitivities are there."""
    settings: dict[str, Any] = {"damping": 1e-2, "target": "local", "shrinkage": 0.0, "score": "greedy"}
    pruned(tiny_llama, tmp_path / "uniform", text_file, "osscar", **settings)
    low, high = 0.6, 0.7
    pruned(
        tiny_llama,
        tmp_path / "bounded",
        text_file,
        "osscar",
        allocator="closed-form",
        min_retention=low,
        max_retention=high,
        **settings,
    )
    assert len(kept(tmp_path / "bounded")["0"]["mlp"]) == len(kept(tmp_path / "uniform")["0"]["mlp"])
    assert kept(tmp_path / "bounded")["0"] == kept(tmp_path / "uniform")["0"]


@pytest.mark.parametrize("method", ["osscar", "spap"])
def test_searches_give_no_scores_to_standardise(method: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="gives no number per unit"):
        pruned(tiny_llama, tmp_path / "out", text_file, method, allocator="standardised")
