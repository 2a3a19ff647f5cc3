"""A run that is cut anywhere goes on, and its result is byte for byte that of a run that was not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune import api
from structprune.api import prune, resume
from structprune.calibration import snapshots
from structprune.calibration.context import CalibrationWindows
from structprune.engine.pipelines import units, units_settings
from structprune.engine.run import identity
from structprune.engine.sensitivity import fisher
from structprune.errors import InputError
from structprune.observer import SilentObserver
from structprune.recipe import Recipe
from structprune.runs.journal import Journal
from support.models import save_tiny
from support.pipeline_cases import RUNS, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


class Cut(BaseException):
    """The process is gone."""


def recipe(name: str, text_file: Path) -> Recipe:
    return tiny_recipe(RUNS[name][1], text_file, memory="1GiB")


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
    if report["repair"] is not None:
        del report["repair"]["seconds"]
    if report["gates"] is not None:
        del report["gates"]["seconds"]
    del files["README.md"], files["pruning_report.html"]
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
            name = f"{self.folder.name}: {step}"
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


# `normed` is cut in all the tests of damage below, and `slice-uniform` has all steps of `slice` and one more.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("normed", "slice") else ()) for name in RUNS]
)
def test_a_run_that_is_cut_behind_every_step(
    name: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "SHARE", float("inf"))
    cutter = Cutter(monkeypatch, behind=True)
    moments = run_through_all_cuts(cutter, model(name, tmp_path), recipe(name, text_file), tmp_path / "cut" / "out")
    assert any("snapshot" in moment for moment in moments)
    assert content(tmp_path / "cut" / "out") == content(tmp_path / "whole" / "out")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("structprune", True),
        ("structprune", False),
        ("fasp", True),
        ("admm", False),
        ("removal", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("fasp", False), ("admm", True), ("removal", False))
        ),
    ],
)
def test_without_snapshots_activations_are_kept_again(
    name: str, cached: bool, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cached:
        monkeypatch.setattr(units_settings, "cacheable", lambda *_: ())
    run_without_snapshots(name, text_file, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "name", ["normed", "parallel", pytest.param("angular", marks=pytest.mark.slow), "slice-uniform"]
)
def test_without_snapshots_the_streams_pass_what_is_written(
    name: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_without_snapshots(name, text_file, tmp_path, monkeypatch)


def run_without_snapshots(name: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut before each step: its files are there, and no line."""
    monkeypatch.setattr(snapshots, "SHARE", 0.0)
    cutter = Cutter(monkeypatch, behind=False)
    moments = run_through_all_cuts(cutter, model(name, tmp_path), recipe(name, text_file), tmp_path / "cut" / "out")
    assert not any("snapshot" in moment for moment in moments)
    assert content(tmp_path / "cut" / "out") == content(tmp_path / "whole" / "out")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["out"]


class Listener(SilentObserver):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Halted:
    """A `structprune` run that was cut behind its second block, and what it would have given."""

    source: Path
    asked: Recipe
    output: Path
    whole: dict[str, Any]

    @property
    def partial(self) -> Path:
        return self.output.with_name("out.partial")


@pytest.fixture(scope="module")
def base(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a run of it that was cut, and one that was not. Do not modify: copy it."""
    base = tmp_path_factory.mktemp("halted")
    source, asked = model("normed", base), recipe("normed", text_file)
    prune(source, asked, base / "whole" / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "SHARE", float("inf"))
        keep = snapshots.write_json

        def last(path: Path, value: Any) -> None:
            keep(path, value)
            if path.parent.name == "state" and value["position"] == 2:
                raise Cut

        patch.setattr(snapshots, "write_json", last)
        with pytest.raises(Cut):
            prune(source, asked, base / "cut" / "out")
    return base


@pytest.fixture
def halted(base: Path, text_file: Path, tmp_path: Path) -> Halted:
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    return Halted(
        source=tmp_path / "model",
        asked=recipe("normed", text_file),
        output=tmp_path / "cut" / "out",
        whole=content(tmp_path / "whole" / "out"),
    )


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


SHARD = "shards/shard-00003.safetensors"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state/2.pruned", flip_a_bit),
        ("state/2.dense", truncate),
        ("state/2.dense", Path.unlink),
        ("state/state.json", flip_a_bit),
        ("state/state.json", Path.unlink),
        (SHARD, flip_a_bit),
        (SHARD, truncate),
        (SHARD, Path.unlink),
        ("survey/found-1.safetensors", flip_a_bit),
        ("survey/costs-2.safetensors", truncate),
        ("windows.safetensors", flip_a_bit),
    ],
)
def test_damage_is_named_and_computed_again(name: str, damage: Callable[[Path], None], halted: Halted) -> None:
    path = halted.partial / name
    damage(path)
    listener = Listener()
    resume(halted.output, listener)
    assert content(halted.output) == halted.whole
    named = [note for note in listener.notes if note.startswith(str(path))]
    # Without its description a snapshot is none.
    assert bool(named) == (not (damage is Path.unlink and name.endswith("state.json")))


@pytest.mark.parametrize("step", ["block 0", "block 1", "windows"])
def test_damaged_line_of_the_journal(step: str, halted: Halted) -> None:
    journal = halted.partial / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if json.loads(line)["step"] == step)
    lines[number] = lines[number].replace(b'"seconds"', b'"sekunden"')
    journal.write_bytes(b"".join(lines))
    listener = Listener()
    resume(halted.output, listener)
    assert content(halted.output) == halted.whole
    assert f"{journal}: line {number + 1} is damaged; its step is done again" in listener.notes


def test_a_snapshot_is_gone_on_from(halted: Halted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is done is done again: no block is passed, one is pruned."""
    pruned: list[int] = []
    real = units.prune_block

    def count(context: Any, block: Any, *values: Any, **named: Any) -> Any:
        pruned.append(block.index)
        return real(context, block, *values, **named)

    monkeypatch.setattr(units, "prune_block", count)
    monkeypatch.setattr(units, "pass_block", None)
    monkeypatch.setattr(fisher, "backward", None)
    resume(halted.partial)
    assert pruned == [2]
    assert content(halted.output) == halted.whole


def test_resume_of_a_finished_run_gives_its_report(halted: Halted) -> None:
    report = resume(halted.output)
    assert resume(halted.output) == report
    assert report.wall_seconds > sum(block.seconds for block in report.blocks)


def test_paths_count_from_where_the_run_was_started(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model("fasp", tmp_path)
    asked = recipe("fasp", text_file)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        cutter = Cutter(patch, behind=True)
        cutter.cut = {"out.partial: windows", "out.partial: start"}
        with pytest.raises(Cut):
            prune(source.name, asked, "out")
    monkeypatch.chdir("/")
    assert resume(tmp_path / "out").source == source.name
    assert Path.cwd() == Path("/")


def test_nothing_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no run to go on with"):
        resume(tmp_path / "out")


def refused(halted: Halted, **changes: Any) -> str:
    before = {path: path.stat().st_mtime_ns for path in halted.partial.rglob("*")}
    with pytest.raises(InputError) as caught:
        prune(halted.source, halted.asked.model_copy(update=changes), halted.output)
    assert {path: path.stat().st_mtime_ns for path in halted.partial.rglob("*")} == before
    return str(caught.value)


def test_another_recipe_is_refused(halted: Halted) -> None:
    message = refused(halted, sparsity=0.5, seed=3)
    assert message == (
        f"{halted.partial}: the unfinished run here was started with other settings; "
        "got sparsity 0.5, seed 3, wanted sparsity 0.3, seed 0. "
        f"Ask for the same, remove {halted.partial} to start again, or choose another -o."
    )
    resume(halted.output)
    assert content(halted.output) == halted.whole


def test_another_source_is_refused(halted: Halted) -> None:
    weights = halted.source / "model.safetensors"
    flip_a_bit(weights)
    assert "from another source checkpoint (a file holds something else); got model.safetensors" in refused(halted)
    config = halted.source / "config.json"
    config.write_text(config.read_text().replace('"bos_token_id": 0', '"bos_token_id": 1'))
    assert "started from another source checkpoint; got" in refused(halted)


def test_the_same_source_under_another_time(halted: Halted) -> None:
    """What counts is what the files hold."""
    (halted.source / "model.safetensors").touch()
    resume(halted.output)
    assert content(halted.output) == halted.whole


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_replaced_file_with_the_old_time_is_refused(halted: Halted, name: str) -> None:
    path = halted.source / name
    old = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + (b" " if data[-1:] != b" " else b"\n"))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert path.stat().st_size == old.st_size
    assert f"(a file holds something else); got {name}" in refused(halted)


def test_a_changed_text_is_refused(halted: Halted) -> None:
    """One that is gone is not asked for: the windows are kept."""
    (path,) = map(Path, halted.asked.calibration)
    text = path.read_text()
    try:
        path.write_text(text[::-1])
        assert "on another calibration text (the file holds something else)" in refused(halted)
        path.unlink()
        resume(halted.output)
    finally:
        path.write_text(text)
    assert content(halted.output) == halted.whole


def test_another_version_is_refused(halted: Halted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "versions", lambda: {"structprune": "9.9.9"})
    assert "started by other versions; got structprune 9.9.9, wanted structprune 0.1.0" in refused(halted)


def test_another_text_is_refused_where_the_windows_are_lost(halted: Halted) -> None:
    (halted.partial / "windows.safetensors").unlink()
    found = CalibrationWindows(ids_NS=torch.ones(5, 32, dtype=torch.long), description="another")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "drawn_windows", lambda *_: ("another", found))
        with pytest.raises(InputError, match="started on another calibration text"):
            resume(halted.output)
    assert halted.partial.exists()
