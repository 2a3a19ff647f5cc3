"""`prune --gates`: what it may change, what it says, what it is not for, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from structprune import Recipe, prune
from structprune.allocation.gates import GATES
from structprune.api import plan, resume
from structprune.errors import InputError, StructPruneError, UnsupportedError
from structprune.observer import SilentObserver
from structprune.phases import Phase
from structprune.results.gates import GatesReport
from structprune.results.report import PruneReport
from structprune.results.summary import summary_rows
from structprune.training import loop
from structprune.training.gates import choose
from structprune.training.gates.student import GatedStudent
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings = {"method": "structprune", "scope": "all", "sparsity": 0.4, "num_samples": 12, "seq_len": 32}
    common = {"calibration": str(text_file), "dtype": "float32", "multiple_of": 1, "sensitivity_samples": 4}
    gates = {"gates": "graspprune", "gates_steps": STEPS, "reload_check": False}
    return Recipe.build(**{**settings, **common, **gates, **changes})


def weights(output: Path) -> Mapping[str, Tensor]:
    return load_file(output / "model.safetensors")


def kept(output: Path) -> list[dict[str, list[int]]]:
    """Units that stay, per block."""
    found = json.loads((output / "pruning_manifest.json").read_text(encoding="utf-8"))["kept_indices"]
    return [found[number] for number in sorted(found, key=int)]


def always(patch: pytest.MonkeyPatch, *, accepted: bool) -> None:
    """Let what was learned count, or not, whatever the windows kept apart say."""
    report = choose._report  # pyright: ignore[reportPrivateUsage]

    def judged(*values: Any) -> GatesReport:
        return report(*values).model_copy(update={"accepted": accepted})

    patch.setattr(choose, "_report", judged)


@pytest.fixture(scope="module")
def gated(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> PruneReport:
    """The report of a run whose learned choice counts."""
    with pytest.MonkeyPatch.context() as patch:
        always(patch, accepted=True)
        return prune(tiny_llama, recipe(text_file, reload_check=True), tmp_path_factory.mktemp("gated") / "out")


@pytest.fixture(scope="module")
def plain(tiny_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> PruneReport:
    """The report of the same run without gates."""
    return prune(tiny_llama, recipe(text_file, gates="none", gates_steps=128), tmp_path_factory.mktemp("plain") / "out")


def test_the_units_that_stay_are_the_learned_ones(gated: PruneReport, plain: PruneReport) -> None:
    found = gated.gates
    assert found is not None
    assert plain.gates is None
    assert found.num_changed > 0
    widths = {(block.block, block.kind): block.kept_units for block in gated.blocks}
    for one in found.sublayers:
        assert widths[one.block, one.kind] == one.kept_after
        assert len(kept(Path(gated.output))[one.block][one.kind]) == one.kept_after
        # As many as can change sides, and not more.
        assert abs(one.kept_after - one.kept_before) <= one.num_free
        assert one.came <= one.num_free
    assert kept(Path(gated.output)) != kept(Path(plain.output))
    # Both remove what was asked, and hardly more.
    for report in (gated, plain):
        assert 0.4 <= report.size.removed_share_of_scope < 0.5
    # Consumers are solved for the units that stay.
    assert all(
        block.error is None or block.error_mask_only is None or block.error <= block.error_mask_only
        for block in gated.blocks
    )
    assert gated.reload.relative_difference is not None
    assert gated.reload.relative_difference < 1e-4


def test_what_is_reported(gated: PruneReport, plain: PruneReport) -> None:
    found = gated.gates
    assert found is not None
    assert (found.learner, found.steps, found.num_windows, len(found.losses)) == ("graspprune", STEPS, 11, STEPS)
    (text,) = found.texts
    assert text.num_windows == 1
    assert text.before > 0
    row = dict(summary_rows(gated))["gates by graspprune"]
    assert f"{found.num_changed} units of 2 blocks changed places" in row
    assert f"{text.before:.4f} -> {text.after:.4f}" in row
    assert not any("gates" in name for name, _ in summary_rows(plain))
    pages = [(Path(one.output) / "pruning_report.html").read_text(encoding="utf-8") for one in (plain, gated)]
    assert ["Loss by step, graspprune" in page for page in pages] == [False, True]
    assert ["Gates by graspprune" in page for page in pages] == [False, True]


def test_where_nothing_helps_the_result_is_that_without_gates(
    tiny_llama: Path, plain: PruneReport, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, accepted=False)
    listener = Stopper(0)
    report = prune(tiny_llama, recipe(text_file), tmp_path / "out", listener)
    expected, found = weights(Path(plain.output)), weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert report.gates is not None
    assert "not every text came nearer" in dict(summary_rows(report))["gates by graspprune"]
    assert any(note.startswith("gates (graspprune): not every text") for note in listener.notes)


@pytest.mark.parametrize("better", [True, False])
def test_a_choice_counts_if_every_text_comes_nearer(
    better: bool, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two texts: one comes nearer, the other one as the case says."""
    calls: list[int] = []

    def measured(self: GatedStudent, windows: Sequence[int]) -> list[float]:
        calls.append(len(windows))
        # At the start both texts, then both again.
        return {1: [1.0], 2: [1.0], 3: [0.5], 4: [0.9 if better else 1.1]}[len(calls)]

    monkeypatch.setattr(GatedStudent, "measure", measured)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    asked = recipe(text_file, calibration=[str(text_file), str(other)], scope="mlp", gates_steps=2)
    report = prune(tiny_llama, asked, tmp_path / "out").gates
    assert report is not None
    assert report.accepted == better
    assert [(text.before, text.after) for text in report.texts] == [(1.0, 0.5), (1.0, 0.9 if better else 1.1)]
    assert [Path(text.name).name for text in report.texts] == ["words.txt", "other.txt"]


@pytest.mark.parametrize("name", [name for name in GATES if name != "graspprune"])
def test_every_learner_goes_through_a_run(
    name: str, tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, accepted=True)
    report = prune(tiny_llama, recipe(text_file, gates=name, gates_steps=3, scope="mlp"), tmp_path / "out")
    assert report.gates is not None
    assert report.gates.steps == 3
    assert 0.4 <= report.size.removed_share_of_scope < 0.45
    if GATES.get(name).keeps_widths:
        assert all(one.kept_after == one.kept_before for one in report.gates.sublayers)


@pytest.mark.parametrize(
    "changes", [{"structure": "uniform"}, {"method": "fasp", "allocator": "closed-form"}, {"allocator": "dp"}], ids=str
)
def test_other_widths_and_choices(
    changes: dict[str, Any], tiny_opt: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch, accepted=True)
    report = prune(tiny_opt, recipe(text_file, scope="mlp", gates_steps=3, **changes), tmp_path / "out")
    assert report.gates is not None
    if "structure" in changes:
        assert len({block.kept_units for block in report.blocks}) == 1


class Stop(BaseException):
    """The process is gone."""


class Stopper(SilentObserver):
    """Ends the process at a step of the gates."""

    def __init__(self, at: int) -> None:
        self.at, self.name, self.count = at, "", 0
        self.notes: list[str] = []

    def start(self, phase: str, total: int) -> None:
        self.name, self.count = phase, 0

    def advance(self, detail: str) -> None:
        self.count += 1
        if self.name == "gates" and self.count == self.at:
            raise Stop

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("damaged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_goes_on_from_its_own_snapshot(
    *,
    damaged: bool,
    tiny_llama: Path,
    gated: PruneReport,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    always(monkeypatch, accepted=True)
    monkeypatch.setattr(loop, "_LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr(loop, "_SNAPSHOT_SHARE", float("inf"))
    output = tmp_path / "out"
    with pytest.raises(Stop):
        prune(tiny_llama, recipe(text_file, reload_check=True), output, Stopper(5))
    (snapshot,) = (tmp_path / "out.partial" / "gates" / "state").glob("snapshot-*")
    if damaged:
        (snapshot / "learner.safetensors").write_bytes(b"")
    listener = Stopper(0)
    resume(output, listener)
    went_on = [note for note in listener.notes if note.startswith("going on after step")]
    assert went_on == ([] if damaged else ["going on after step 4 of an earlier run"])
    assert any("the gates begin anew" in note for note in listener.notes) == damaged
    expected, found = weights(Path(gated.output)), weights(output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"gates": "grasp"}, InputError, "unknown gate learner 'grasp'"),
        ({"method": "wanda-sp", "scope": "mlp"}, UnsupportedError, "gates begin with what each removal costs the loss"),
        ({"num_samples": 1, "damping": 0.01}, InputError, "one window cannot both teach the gates and measure them"),
        ({"head_units": "value-channel"}, UnsupportedError, "every KV head keeps as many units"),
    ],
    ids=["name", "costs", "windows", "partitions"],
)
def test_what_it_is_not_for(
    changes: dict[str, Any], error: type[StructPruneError], text: str, tiny_llama: Path, text_file: Path
) -> None:
    with pytest.raises(error, match=text):
        plan(tiny_llama, recipe(text_file, **changes))


def test_experts_have_none(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "model")
    with pytest.raises(UnsupportedError, match="the experts of a mixture have no gates"):
        plan(source, recipe(text_file, scope="mlp", target="local", multiple_of=8))


def test_a_text_with_too_few_windows(tiny_llama: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a few words " * 4, encoding="utf-8")
    with pytest.raises(InputError, match="one window cannot both teach the gates and measure them"):
        prune(tiny_llama, recipe(short, damping=0.01, target="local", held_out=0), tmp_path / "out")


def test_it_is_planned(tiny_llama: Path, text_file: Path) -> None:
    with_gates = plan(tiny_llama, recipe(text_file)).plan
    without = plan(tiny_llama, recipe(text_file, gates="none", gates_steps=128)).plan
    assert Phase.GATES in with_gates.phases
    assert Phase.GATES not in without.phases
    assert with_gates.disk_bytes > without.disk_bytes
    assert with_gates.work is not None
    assert without.work is not None
    assert set(with_gates.work) - set(without.work) == {"gates"}
