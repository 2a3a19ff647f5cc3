"""Several shares in one go: an output for each, one measurement of the dense model, and what is done stays done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import structprune
from structprune.comparison.shares import prune_shares, resume_shares
from structprune.engine.sensitivity import cache
from structprune.errors import InputError
from structprune.recipe import Recipe
from structprune.runs.journal import Journal
from support.command_line import CommandLine

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("0.1", "0.3", "0.5")


def recipes(text_file: Path, **changes: Any) -> dict[str, Recipe]:
    settings = {"method": "structprune", "num_samples": 4, "seq_len": 32, "dtype": "float32", "multiple_of": 1}
    common = {**settings, "calibration": str(text_file), "memory": "1GiB", **changes}
    return {name: Recipe.build(**common, sparsity=float(name)) for name in NAMES}


def weights(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name / "model.safetensors").read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Each share by a run of its own."""
    folder = tmp_path_factory.mktemp("alone")
    for name, recipe in recipes(text_file).items():
        structprune.prune(tiny_llama, recipe, folder / name)
    return weights(folder)


def test_each_output_is_that_of_a_run_of_its_own(
    alone: dict[str, bytes], tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Path] = []
    fisher = cache.fisher_pass
    monkeypatch.setattr(cache, "fisher_pass", lambda context, folder: passes.append(folder) or fisher(context, folder))
    reports = prune_shares(tiny_llama, recipes(text_file), tmp_path / "out")
    assert weights(tmp_path / "out") == alone
    assert len(passes) == 1
    assert [report.reused is None for report in reports.values()] == [True, False, False]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*NAMES, "shares.json"]


class Cut(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("by", ["the same call", "resume"])
def test_an_interrupted_call_goes_on(
    by: str,
    alone: dict[str, bytes],
    tiny_llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = Journal.record

    def cut(self: Journal, step: str, *values: Any, **named: Any) -> Any:
        if step == "block 1" and self.folder.name == "0.3.partial":
            raise Cut
        return record(self, step, *values, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", cut)
        with pytest.raises(Cut):
            prune_shares(tiny_llama, recipes(text_file), tmp_path / "out")
    first = (tmp_path / "out" / "0.1" / "pruning_report.json").stat()
    if by == "resume":
        reports = resume_shares(tmp_path / "out")
    else:
        reports = prune_shares(tiny_llama, recipes(text_file), tmp_path / "out")
    assert weights(tmp_path / "out") == alone
    assert list(reports) == list(NAMES)
    assert (tmp_path / "out" / "0.1" / "pruning_report.json").stat().st_mtime_ns == first.st_mtime_ns


def test_another_question_is_refused(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    prune_shares(tiny_llama, recipes(text_file, method="fasp"), tmp_path / "out")
    with pytest.raises(InputError, match="begun with other shares, settings or another model"):
        prune_shares(tiny_llama, recipes(text_file, method="fasp", seed=1), tmp_path / "out")
    with pytest.raises(InputError, match="exists and is no folder of several shares"):
        prune_shares(tiny_llama, recipes(text_file), tmp_path / "out" / "0.1")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists and is no folder of several shares"):
        prune_shares(tiny_llama, recipes(text_file), tmp_path / "file")


def test_what_one_share_cannot_have_is_refused_before_any_work(
    tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="the text file does not exist"):
        prune_shares(tiny_llama, recipes(tmp_path / "none.txt"), tmp_path / "out")
    # Found by the first run, when the text is read.
    (tmp_path / "short.txt").write_text("few words")
    with pytest.raises(InputError, match="short"):
        prune_shares(tiny_llama, recipes(tmp_path / "short.txt"), tmp_path / "out")
    (tmp_path / "short.txt").unlink()
    asked = {**recipes(text_file), "0.95": Recipe.build(calibration=str(text_file), num_samples=4, sparsity=0.95)}
    with pytest.raises(InputError, match="cannot be reached"):
        prune_shares(tiny_llama, asked, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_command_line(tiny_llama: Path, text_file: Path, tmp_path: Path, command_line: CommandLine) -> None:
    flags = ["--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "--dtype", "float32", "--multiple-of", 1]
    code, out, _ = command_line("prune", tiny_llama, "-o", tmp_path / "out", "-q", *flags, "--sparsity", "0.1,30%")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.strip().startswith("0.")] == ["0.1", "0.3"]
    code, out, _ = command_line("resume", tmp_path / "out", "-q", "--json")
    assert code == 0
    found = json.loads(out)
    assert [report["recipe"]["sparsity"] for report in found.values()] == [0.1, 0.3]
    saved = tmp_path / "out" / "0.1" / "pruning_path.json"
    more = ["--allocation", saved, "--method", "fasp", "--sparsity", "0.2,0.4"]
    code, _, _ = command_line("prune", tiny_llama, "-o", tmp_path / "more", "-q", *flags, *more)
    assert code == 0
    sizes = [
        json.loads((tmp_path / "more" / name / "pruning_report.json").read_text())["size"]["removed_share_of_scope"]
        for name in ("0.2", "0.4")
    ]
    assert 0.2 <= sizes[0] < 0.22 < 0.4 <= sizes[1] < 0.42
    code, _, said = command_line("prune", tiny_llama, "-o", tmp_path / "twice", *flags, "--sparsity", "0.1,10%")
    assert code == 2
    assert "--sparsity names a share twice; got 0.1,10%" in said
