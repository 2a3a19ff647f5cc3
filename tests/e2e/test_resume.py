"""A run that is cut anywhere goes on, and its result is byte for byte that of a run that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import save_tiny
from structprune.api import prune
from structprune.calibration import snapshots
from structprune.recipe import Recipe
from structprune.runs.journal import Journal

pytestmark = pytest.mark.usefixtures("one_thread")


class Cut(BaseException):
    """The process is gone."""


# Every walk, every survey, and what moves the streams in another way.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "structprune": ("llama", {"method": "structprune", "scope": "all", "outer_iterations": 1}),
    "normed": ("gemma2", {"method": "structprune"}),
    "parallel": ("gpt_neox", {"method": "structprune"}),
    "experts": ("qwen3_moe", {"method": "structprune", "target": "local", "multiple_of": 8}),
    "removal": ("llama", {"method": "structprune", "allow_block_removal": True, "sparsity": 0.6}),
    "admm": ("llama", {"method": "structprune", "solver": "admm"}),
    "fasp": ("llama", {"method": "fasp"}),
    "flap": ("llama", {"method": "flap"}),
    "llm-pruner": ("llama", {"method": "llm-pruner", "protect_first": 0, "protect_last": 0}),
    "angular": ("llama", {"method": "depth", "sparsity": 0.4}),
    "measured-loss": ("llama", {"method": "depth", "sparsity": 0.6, "score": "measured-loss"}),
    "slice": ("llama", {"method": "slicegpt"}),
    "slice-uniform": ("llama", {"method": "slicegpt", "structure": "uniform"}),
}


def recipe(name: str, text_file: Path) -> Recipe:
    settings = RUNS[name][1]
    common = {"calibration": str(text_file), "num_samples": 5, "seq_len": 32, "dtype": "float32", "memory": "1GiB"}
    if settings["method"] not in ("depth", "slicegpt"):
        common |= {"multiple_of": 1, "sensitivity_samples": 3}
    return Recipe.build(**{**common, **settings})


def model(name: str, directory: Path) -> Path:
    return save_tiny(RUNS[name][0], directory / "model", num_blocks=3)


def content(output: Path) -> dict[str, Any]:
    """Name -> bytes of each file; of the report all but times and memory."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in output.iterdir()}
    report = json.loads(files.pop("pruning_report.json"))
    for block in report["blocks"]:
        del block["seconds"]
    for name in ("output", "wall_seconds", "memory", "reload"):
        del report[name]
    del files["README.md"]
    return files | {"report": report}


class Cutter:
    """Ends the process before or behind each step and snapshot, the first time that it comes to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, behind: bool) -> None:
        self.seen: list[str] = []
        self.cut: set[str] | None = None
        record, write_json = Journal.record, snapshots.write_json

        def moment(name: str, work: Callable[[], Any]) -> Any:
            self.seen.append(name)
            result = work() if behind else None
            if self.cut is not None and name not in self.cut:
                self.cut.add(name)
                raise Cut
            return result if behind else work()

        def recorded(self: Journal, step: str, *values: Any, **named: Any) -> Any:
            name = f"{self._folder.name}: {step}"
            return moment(name, lambda: record(self, step, *values, **named))

        def kept(path: Path, value: Any) -> None:
            name = f"{path.parent.parent.name}/{path.parent.name}: snapshot {value['position']}"
            moment(name, lambda: write_json(path, value))

        monkeypatch.setattr(Journal, "record", recorded)
        monkeypatch.setattr(snapshots, "write_json", kept)


def run_through_all_cuts(cutter: Cutter, source: Path, asked: Recipe, output: Path) -> list[str]:
    """Run again and again until nothing is cut any more. Returns the moments of a run that is not cut at all."""
    cutter.cut = None
    prune(source, asked, output.parents[1] / "whole" / output.name)
    moments, cutter.cut = cutter.seen.copy(), set()
    for _ in moments:
        try:
            prune(source, asked, output)
            break
        except Cut:
            continue
    else:
        prune(source, asked, output)
    # A snapshot behind the last step of a loop is not asked for any more.
    assert [moment for moment in moments if moment not in cutter.cut and "snapshot" not in moment] == []
    return moments


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_cut_behind_every_step(
    name: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "SHARE", float("inf"))
    cutter = Cutter(monkeypatch, behind=True)
    moments = run_through_all_cuts(cutter, model(name, tmp_path), recipe(name, text_file), tmp_path / "cut" / "out")
    assert any("snapshot" in moment for moment in moments)
    assert content(tmp_path / "cut" / "out") == content(tmp_path / "whole" / "out")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["structprune", "normed", "parallel", "removal", "angular", "slice-uniform"])
def test_without_snapshots_the_streams_pass_what_is_written(
    name: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut before each step: its files are there, and no line."""
    monkeypatch.setattr(snapshots, "SHARE", 0.0)
    cutter = Cutter(monkeypatch, behind=False)
    moments = run_through_all_cuts(cutter, model(name, tmp_path), recipe(name, text_file), tmp_path / "cut" / "out")
    assert not any("snapshot" in moment for moment in moments)
    assert content(tmp_path / "cut" / "out") == content(tmp_path / "whole" / "out")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["out"]
