"""How long a run will take: what is counted beforehand is what happens, and what is said of it."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune import Recipe, prune
from structprune.api import plan
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.model import StockModel
from structprune.engine.pace import Minutes
from structprune.engine.planning.pieces import Piece, What
from structprune.engine.streaming.propagate import Propagator
from structprune.statistics import GramAccumulator
from structprune.types import Stage
from support.command_line import CommandLine
from support.models import save_tiny

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
    "repair": ("llama", {"method": "fasp", "multiple_of": 1, "repair": "scales"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, folder / family) for family in {family for family, _ in CASES.values()}}


class Watch:
    """Counts windows over stages, and windows whose sums are taken, while a run goes on."""

    def __init__(self, seq_len: int, stages: Sequence[Stage]) -> None:
        self.seen: Counter[Piece] = Counter()
        self.seq_len = seq_len
        self.stages = stages

    def install(self, patch: pytest.MonkeyPatch) -> None:
        apply, stage, update = Propagator.apply, StockModel.stage, GramAccumulator.update
        inside: list[Stage] = []

        @contextlib.contextmanager
        def entered(model: StockModel, block: Any, which: Stage) -> Generator[None]:
            with stage(model, block, which):
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
    watch = Watch(32, StockModel(open_model(str(model))).stages)
    watch.install(monkeypatch)
    prune(model, recipe, tmp_path / "out")
    assert watch.seen == planned


def test_every_kind_of_work_is_timed(models: dict[str, Path]) -> None:
    """All methods together do all of it, and more of it takes longer."""
    done: set[What] = set()
    for family, changes in CASES.values():
        found = plan(models[family], Recipe.build(**{**UNITS, "calibration": "auto", **changes}), timed=True)
        assert found.minutes is not None
        assert found.plan.work is not None
        assert list(found.minutes.stretches) == list(found.plan.work)
        assert all(seconds > 0 for seconds in found.minutes.stretches.values())
        assert found.minutes.seconds > sum(found.minutes.stretches.values())
        done |= {piece.what for counts in found.plan.work.values() for piece in counts}
    assert done == set(What)


def test_an_iterative_solver_is_not_foretold(models: dict[str, Path]) -> None:
    assert plan(models["llama"], Recipe.build(method="spap"), timed=True).minutes is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "about a minute"),
        (89, "about a minute"),
        (100, "about 2 minutes"),
        (5399, "about 90 minutes"),
        (9000, "about 2.5 hours"),
    ],
)
def test_in_words(seconds: float, text: str) -> None:
    assert Minutes(seconds=seconds, stretches={}).text == text


def test_commands_say_it(models: dict[str, Path], text_file: Path, tmp_path: Path, command_line: CommandLine) -> None:
    flags = ("--calibration", text_file, "--num-samples", 4, "--seq-len", 32, "--dtype", "float32", "--method", "fasp")
    code, out, _ = command_line("plan", models["llama"], *flags)
    assert code == 0
    assert "about a minute on this machine" in out
    code, out, _ = command_line("plan", models["llama"], *flags, "--json")
    seconds = json.loads(out)["seconds"]
    assert seconds["all"] > sum(seconds["stretches"].values()) > 0
    code, _, err = command_line("prune", models["llama"], "-o", tmp_path / "out", *flags)
    assert code == 0
    assert "expected to take about a minute on this machine" in err.splitlines()[0]
    code, _, err = command_line("prune", models["llama"], "-o", tmp_path / "quiet", "--quiet", *flags)
    assert code == 0
    assert "expected" not in err
