"""How long a run will take: what is counted beforehand is what happens, and what is said of it."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune import Recipe, prune
from structprune.api import RunPlan, plan
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.maps import map_steps
from structprune.architectures.stock.model import StockModel
from structprune.engine import resolve
from structprune.engine.planning.pieces import Piece, What, Work
from structprune.engine.run.pace import in_words
from structprune.engine.streaming.propagate import Propagator
from structprune.errors import InputError
from structprune.observer import SilentObserver
from structprune.recipe import MOST_SAMPLES, ResolvedRecipe
from structprune.statistics import GramAccumulator
from structprune.types import UNIT_KINDS, Stage
from support.command_line import CommandLine
from support.models import save_tiny
from support.spare_rows import save_with_spare_rows

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = {"calibration": None, "num_samples": 6, "seq_len": 32, "dtype": "float32", "held_out": 2, "sparsity": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fasp": ("llama", {"method": "fasp", "multiple_of": 1}),
    "both sublayers": ("llama", {"method": "fasp", "multiple_of": 1, "scope": "all"}),
    "parallel sublayers": ("gpt_neox", {"method": "wanda-sp", "multiple_of": 1}),
    "flap": ("llama", {"method": "flap", "multiple_of": 1}),
    "structprune": ("llama", {"method": "structprune", "multiple_of": 1, "sensitivity_samples": 2}),
    "rehearsed": (
        "llama",
        {"method": "structprune", "multiple_of": 1, "sensitivity_samples": 2, "outer_iterations": 1},
    ),
    "magnitude": ("llama", {"method": "magnitude", "multiple_of": 1}),
    "llm-pruner": ("llama", {"method": "llm-pruner", "multiple_of": 1, "sensitivity_samples": 2}),
    "blocks by angles": ("llama", {"method": "depth"}),
    "blocks by losses": ("llama", {"method": "depth", "score": "measured-loss", "sensitivity_samples": 2}),
    "slices": ("llama", {"method": "slicegpt"}),
    "slices of one basis": ("llama", {"method": "slicegpt", "structure": "uniform"}),
    "experts": ("qwen3_moe", {"method": "reap"}),
    "gates": (
        "llama",
        {
            "method": "structprune",
            "multiple_of": 1,
            "scope": "all",
            "sensitivity_samples": 2,
            "gates": "graspprune",
            "gates_steps": 7,
        },
    ),
    "gates, forward only": (
        "llama",
        {"method": "structprune", "multiple_of": 1, "sensitivity_samples": 2, "gates": "bypass", "gates_steps": 3},
    ),
    "single weights": ("llama", {"method": "wanda", "solver": "refit", "target": "dense-path", "allocator": "owl"}),
    "single weights of experts": ("qwen3_moe", {"method": "ria", "pattern": "2:4"}),
    "repair": ("llama", {"method": "fasp", "multiple_of": 1, "repair": "scales"}),
    "repair, two passes": ("llama", {"method": "fasp", "multiple_of": 1, "repair": "scales", "repair_epochs": 2}),
}


# What it does depends on what it finds: counted at most.
SEARCH = {"method": "structprune", "multiple_of": 1, "sensitivity_samples": 2, "num_samples": 24, "search": "evopress"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, folder / family) for family in {family for family, _ in CASES.values()}}


class Watch:
    """Counts windows over stages, and windows whose sums are taken, while a run goes on."""

    def __init__(self, seq_len: int, stages: Iterable[Stage]) -> None:
        self.seen: Counter[Piece] = Counter()
        self.seq_len = seq_len
        self.stages = list(stages)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        apply, stage, update = Propagator.apply, StockModel.stage, GramAccumulator.update
        inside: list[Stage] = []

        @contextlib.contextmanager
        def entered(model: StockModel, block: Any, index: int, which: Stage) -> Generator[None]:
            with stage(model, block, index, which):
                inside.append(which)
                yield
                inside.pop()

        def applied(propagator: Propagator, block: Any, index: int, hidden_BSD: torch.Tensor) -> torch.Tensor:
            for which in inside or self.stages:
                self.seen[Piece(What.STAGE, which[0])] += len(hidden_BSD)
            return apply(propagator, block, index, hidden_BSD)

        def updated(sums: GramAccumulator, x_TI: torch.Tensor, target_TO: torch.Tensor | None = None) -> None:
            self.seen[Piece(What.SUMS)] += len(x_TI) / self.seq_len
            update(sums, x_TI, target_TO)

        patch.setattr(StockModel, "stage", entered)
        patch.setattr(Propagator, "apply", applied)
        patch.setattr(GramAccumulator, "update", updated)


@pytest.mark.parametrize("case", CASES)
def test_a_run_does_what_was_counted(
    case: str, models: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = CASES[case]
    model = models[family]
    recipe = Recipe.build(**{**UNITS, "calibration": str(text_file), "memory": "1GiB", **changes})
    work = plan(model, recipe).plan.work
    assert work is not None
    planned: Counter[Piece] = Counter()
    for counts in work.values():
        for piece, times in counts.items():
            if piece.what is What.STAGE:
                planned[piece] += times
            elif piece.what in (What.SUMS, What.STREAM_SUMS):
                planned[Piece(What.SUMS)] += times
    stock = StockModel(open_model(str(model)))
    for piece, times in work["blocks"].items():
        for step in map_steps(stock, UNIT_KINDS)[0]:
            if (piece.what, piece.kind) == (What.MAP_INPUTS, step.kind):
                # A pass for each step, as far as its maps.
                planned[Piece(What.STAGE, step.stage[0])] += times
            elif (piece.what, piece.kind) == (What.MAP_SUMS, step.kind):
                planned[Piece(What.SUMS)] += times * len(step.groups)
    watch = Watch(32, stock.num_stages)
    watch.install(monkeypatch)
    prune(model, recipe, tmp_path / "out")
    assert watch.seen == planned


def test_every_kind_of_work_is_timed(models: dict[str, Path], tmp_path: Path) -> None:
    """All methods together do all of it, and more of it takes longer."""
    done: set[What] = set()
    more = models | {"spare": save_with_spare_rows("llama", tmp_path / "spare")}
    rows = {"method": "fasp", "multiple_of": 1, "vocabulary": 384, "merge_rows": True}
    for family, changes in (*CASES.values(), ("llama", SEARCH), ("spare", rows)):
        found = plan(more[family], Recipe.build(**{**UNITS, "calibration": "auto", **changes}), timed=True)
        assert found.time is not None
        assert found.plan.work is not None
        assert list(found.time.stretches) == list(found.plan.work)
        assert all(seconds > 0 for seconds in found.time.stretches.values())
        assert found.time.seconds > sum(found.time.stretches.values())
        done |= {piece.what for counts in found.plan.work.values() for piece in counts}
    assert done == set(What)


def test_an_iterative_solver_is_not_foretold(models: dict[str, Path]) -> None:
    assert plan(models["llama"], Recipe.build(method="spap"), timed=True).time is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "about 5 seconds"),
        (38, "about 40 seconds"),
        (50, "about a minute"),
        (89, "about a minute"),
        (100, "about 2 minutes"),
        (5399, "about 90 minutes"),
        (9000, "about 2.5 hours"),
    ],
)
def test_in_words(seconds: float, text: str) -> None:
    assert in_words(seconds) == text


def test_commands_say_it(models: dict[str, Path], text_file: Path, tmp_path: Path, command_line: CommandLine) -> None:
    flags = ("--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "--dtype", "float32", "--method", "fasp")
    code, out, _ = command_line("plan", models["llama"], *flags)
    assert code == 0
    assert re.search(r"time +│ about \d+ seconds on this machine|about a minute on this machine", out)
    code, out, _ = command_line("plan", models["llama"], *flags, "--json")
    seconds = json.loads(out)["seconds"]
    assert seconds["all"] > sum(seconds["stretches"].values()) > 0
    code, _, err = command_line("prune", models["llama"], "-o", tmp_path / "out", *flags)
    assert code == 0
    assert err.startswith("expected to take about ")
    code, _, err = command_line("prune", models["llama"], "-o", tmp_path / "quiet", "--quiet", *flags)
    assert code == 0
    assert "expected" not in err


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every kind of work take so long, in place of a measurement."""

    def pace(stock: StockModel, recipe: ResolvedRecipe, work: Work, *_: Any) -> dict[Piece, float]:
        return {piece: seconds for counts in work.values() for piece in counts}

    monkeypatch.setattr(resolve, "measured_pace", pace)


def chosen(model: Path, **changes: Any) -> RunPlan:
    return plan(model, Recipe.build(**{"method": "fasp", "seq_len": 64, "dtype": "float32", **changes}), timed=True)


def test_windows_are_what_there_is_time_for(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.3)
    found = chosen(models["llama"], time_budget="7m")
    number = found.recipe.num_samples
    assert 64 < number < MOST_SAMPLES
    assert found.time is not None
    assert 400 < found.time.seconds <= 420
    more = chosen(models["llama"], num_samples=number + 2)
    assert more.time is not None
    assert found.notes[0] == (
        f"{number} calibration windows of 64 tokens: what this machine does in about 7 minutes "
        "(--num-samples or --time-budget say otherwise)"
    )
    assert more.notes[:1] != found.notes[:1]
    # An eighth is kept apart, of those that there are.
    assert found.recipe.held_out == max(number // 8, 32)


def test_twenty_minutes_where_nothing_is_said(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.9)
    found = chosen(models["llama"])
    assert found.time is not None
    assert 1100 < found.time.seconds <= 1200
    assert "about 20 minutes" in found.notes[0]
    slow(monkeypatch, 0.001)
    found = chosen(models["llama"])
    assert found.recipe.num_samples == MOST_SAMPLES
    assert not any("calibration windows" in note for note in found.notes)


def test_never_fewer_than_are_good(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 10.0)
    found = chosen(models["llama"], time_budget="1m")
    assert found.recipe.num_samples == 64
    assert found.time is not None
    assert found.notes[0].startswith("64 calibration windows of 64 tokens, which take about ")
    assert "instead of about a minute: fewer would be too few for up to 48 units of a block" in found.notes[0]


def test_a_run_that_cannot_have_fewer_says_so(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 32 tokens: 128 of them are the fewest that are good and the most that are taken."""
    slow(monkeypatch, 10.0)
    found = chosen(models["llama"], seq_len=32, time_budget="1m")
    assert found.recipe.num_samples == MOST_SAMPLES
    assert "fewer would be too few" in found.notes[0]


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, 16),
        ({"allocator": "closed-form"}, MOST_SAMPLES),
        ({"pattern": "2:4"}, 16),
        ({"pattern": "2:4", "solver": "refit"}, MOST_SAMPLES),
        ({"pattern": "unstructured", "allocator": "owl"}, MOST_SAMPLES),
    ],
)
def test_few_where_windows_decide_nothing(
    models: dict[str, Path], changes: dict[str, str], windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 1e-6)
    assert chosen(models["llama"], method="magnitude", **changes).recipe.num_samples == windows


def test_what_cannot_be_counted_is_not_limited(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 10.0)
    assert chosen(models["llama"], method="spap", time_budget="1m").recipe.num_samples == MOST_SAMPLES


def test_two_ways_to_say_it(models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="--num-samples and --time-budget would decide the same thing"):
        chosen(models["llama"], num_samples=4, time_budget="1m")


def test_a_run_goes_on_with_its_windows(
    models: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the machine is like by then; and a recipe that a report holds can be asked for again."""
    recipe = Recipe.build(
        method="fasp", seq_len=64, dtype="float32", calibration=str(text_file), time_budget="7m", multiple_of=1
    )
    slow(monkeypatch, 0.3)
    whole = prune(models["llama"], recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("structprune.engine.pipelines.units.finalize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(models["llama"], recipe, tmp_path / "out")
    slow(monkeypatch, 1e-6)
    notes: list[str] = []
    observer = SilentObserver()
    monkeypatch.setattr(observer, "note", notes.append)
    report = prune(models["llama"], recipe, tmp_path / "out", observer)
    number = whole.recipe.num_samples
    assert notes[0] == f"going on with the {number} calibration windows that the run was begun with"
    assert report.recipe.num_samples == whole.recipe.num_samples
    assert 64 < report.recipe.num_samples < MOST_SAMPLES
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    again = prune(models["llama"], Recipe.build(**report.recipe.model_dump(mode="json")), tmp_path / "again")
    assert again.recipe.num_samples == whole.recipe.num_samples


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt
