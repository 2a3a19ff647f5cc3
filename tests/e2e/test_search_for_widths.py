"""A run that searches for widths: what it takes, how it goes on after an interruption, and what it says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from structprune import Recipe, prune
from structprune.api import plan, resume
from structprune.engine.resolve import check, plan_run
from structprune.engine.search.fitness import Fitness
from structprune.errors import InputError, UnsupportedError
from structprune.recipe.widths import WIDTHS_NAME, read_widths
from structprune.report.page import prune_page
from structprune.results.report import PruneReport
from structprune.results.summary import summary_rows
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model one of whose MLPs counts far more than the others."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("search") / "model", num_blocks=3)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    for block in range(3):
        tensors[f"model.layers.{block}.mlp.down_proj.weight"] *= 6.0 if block == 1 else 0.2
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def recipe(text_file: Path, **changes: Any) -> Recipe:
    """A search, with what is not None of `changes`."""
    settings: dict[str, Any] = {"num_samples": 32, "seq_len": 32, "held_out": 2, "dtype": "float32", "multiple_of": 1}
    settings |= {"sparsity": 0.5, "search": "evopress", "search_generations": 4, "search_children": 5}
    settings |= {"calibration": str(text_file), "reload_check": False, **changes}
    return Recipe.build(**{name: value for name, value in settings.items() if value is not None})


def without_search(text_file: Path, **changes: Any) -> Recipe:
    return recipe(text_file, **dict.fromkeys(("search", "search_generations", "search_children")), **changes)


def weights(output: Path) -> bytes:
    (path,) = output.glob("*.safetensors")
    return path.read_bytes()


@pytest.fixture(scope="module")
def searched(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> PruneReport:
    """From equal widths, which are far from the best."""
    return prune(model, recipe(text_file, allocator="uniform"), tmp_path_factory.mktemp("searched") / "out")


def test_better_widths_are_found_and_taken(searched: PruneReport) -> None:
    search = searched.search
    assert search is not None
    assert len(search.generations) == 4
    assert search.taken
    assert search.standard_error is not None
    assert search.gain == pytest.approx(search.start_loss - search.found_loss)
    assert search.gain > 2 * search.standard_error > 0
    # The block that counts most gets more than the others.
    kept = {block.block: block.kept_units for block in searched.blocks}
    assert list(kept.values()) == search.found_widths["mlp"]
    assert search.start_widths["mlp"] == [24] * 3
    assert kept[1] > 24
    assert sum(kept.values()) <= 3 * 24
    assert searched.size.removed_share_of_scope >= 0.5
    widths = read_widths(Path(searched.output) / WIDTHS_NAME)
    assert widths.blocks[1]["mlp"] == kept[1]


def test_the_result_says_what_was_searched(searched: PruneReport) -> None:
    search = searched.search
    assert search is not None
    rows = dict(summary_rows(searched))
    assert rows["search over widths"] == search.line
    assert f"{search.start_loss:.4f} -> {search.found_loss:.4f} nats per token on 8 windows" in search.line
    assert "taken" in search.line
    page = prune_page(searched)
    assert "Best so far, by generation" in page
    assert "MLP channels before and after" in page
    assert {name for name in searched.memory.phases if name.startswith("search")} == {
        "search: statistics",
        "search: candidates",
        "search: order (mlp)",
        "search: solve (mlp)",
    }
    assert searched.memory.measured_peak_bytes <= searched.memory.planned_peak_bytes
    for name in ("search: statistics", "search: candidates", "search: order (mlp)", "search: solve (mlp)"):
        assert 0 < searched.memory.measured_phases[name] <= searched.memory.phases[name]


def test_nothing_of_the_search_is_left(searched: PruneReport) -> None:
    output = Path(searched.output)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert not [path for path in output.rglob("*") if "search" in path.name or "solved" in path.name]


@pytest.mark.parametrize("stop", [4, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 9, 10))])
def test_an_interrupted_search_ends_with_the_same_bytes(
    searched: PruneReport,
    model: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    measured = Fitness._streamed  # pyright: ignore[reportPrivateUsage]
    calls: list[int] = []

    def cut(self: Fitness, number: int, *args: Any) -> list[list[float]]:
        calls.append(number)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return measured(self, number, *args)

    monkeypatch.setattr(Fitness, "_streamed", cut)
    with pytest.raises(KeyboardInterrupt):
        prune(model, recipe(text_file, allocator="uniform"), tmp_path / "out")
    report = resume(tmp_path / "out")
    assert isinstance(report, PruneReport)
    assert weights(tmp_path / "out") == weights(Path(searched.output))
    assert calls[: stop - 1] == list(range(stop - 1))
    # Nothing is measured twice, and what follows is asked for as if there had been no cut.
    assert calls[stop:] == list(range(stop - 1, 10))

    def timeless(found: PruneReport) -> dict[str, Any]:
        assert found.search is not None
        generations = [each.model_copy(update={"seconds": 0.0}) for each in found.search.generations]
        return found.search.model_copy(update={"seconds": 0.0, "generations": generations}).model_dump()

    assert timeless(report) == timeless(searched)


def test_without_a_gain_the_start_stays(model: Path, text_file: Path, tmp_path: Path) -> None:
    asked = recipe(text_file, search_generations=1, search_children=1, sparsity=0.3)
    report = prune(model, asked, tmp_path / "out")
    plain = prune(model, without_search(text_file, sparsity=0.3), tmp_path / "plain")
    search = report.search
    assert search is not None
    assert not search.taken
    assert "the start stays" in search.line
    assert plain.search is None
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


def test_several_limits_several_texts_and_the_worst_of_them(model: Path, text_file: Path, tmp_path: Path) -> None:
    """Proposals hold every limit, and the fitness is that of the worst text."""
    other = tmp_path / "other.txt"
    other.write_text("0123456789" * 800)
    asked = recipe(
        text_file,
        calibration=[str(text_file), str(other)],
        scope="all",
        allocator="milp",
        objective="worst",
        allow_block_removal=True,
        sparsity=None,
        target_parameters=25_000,
        target_kv_cache="128:32KiB",
        search_generations=2,
        search_children=3,
    )
    report = prune(model, asked, tmp_path / "out")
    assert len(report.limits) == 2
    assert all(limit.reached <= limit.at_most for limit in report.limits)
    search = report.search
    assert search is not None
    assert search.num_windows == 8
    assert search.num_measured > 10


def test_a_stock_config_describes_what_a_search_for_one_shape_finds(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    """It begins with equal widths, and whatever it takes is one shape of all blocks."""
    asked = recipe(text_file, search="grid", search_children=2, scope="all", sparsity=0.4, structure="uniform")
    report = prune(model, asked, tmp_path / "out")
    assert report.recipe.per_layer is False
    assert report.search is not None
    assert report.search.finalist_losses
    kept = {kind: {b.kept_units for b in report.blocks if b.kind == kind} for kind in ("attention", "mlp")}
    assert all(len(counts) == 1 for counts in kept.values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert loaded.config.intermediate_size in kept["mlp"]


def test_predicted_losses_are_corrected_by_what_single_sublayers_lose(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    counted = {"search_generations": None, "search_children": None}
    asked = recipe(text_file, search="exact", search_anchors=True, allow_block_removal=True, **counted)
    report = prune(model, asked, tmp_path / "out")
    search = report.search
    assert search is not None
    # A width of each, and each without any units.
    assert [(anchor.block, anchor.kept_units > 0) for anchor in search.anchors] == [
        *((block, True) for block in range(3)),
        *((block, False) for block in range(3)),
    ]
    assert all(anchor.measured > 0 for anchor in search.anchors)
    assert "Measured over predicted loss" in prune_page(report)
    # 6 single ones, 2 pairs, the last comparison, the draws of other units.
    assert search.num_measured == 6 + 2 + 1 + len(search.finalist_losses) + search.num_masks


def test_the_plan_counts_the_search(model: Path, text_file: Path) -> None:
    without = plan(model, without_search(text_file))
    with_search = plan(model, recipe(text_file))
    assert {str(phase) for phase in with_search.plan.phases} - {str(phase) for phase in without.plan.phases} == {
        "search: statistics",
        "search: candidates",
        "search: order (mlp)",
        "search: solve (mlp)",
    }
    assert with_search.plan.disk_bytes > without.plan.disk_bytes
    assert with_search.plan.work is not None
    assert without.plan.work is not None
    assert set(with_search.plan.work) - set(without.plan.work) == {"search"}


def test_a_search_is_not_for_several_ranks(model: Path, text_file: Path) -> None:
    several: Any = SimpleNamespace(size=2)
    resolved = replace(check(str(model), recipe(text_file)), ranks=several)
    with pytest.raises(UnsupportedError, match="a search over widths is not for several ranks"):
        plan_run(resolved, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": "evopres"}, "unknown search 'evopres'"),
        ({"method": "wanda-sp", "allocator": "uniform"}, "a search over widths starts from predicted losses"),
        ({"structure": "uniform"}, "gives every block its own width"),
        ({"sparsity": 0.0}, "nothing is to go"),
        ({"num_samples": 3}, "too few calibration windows for a search"),
        ({"search": "none"}, "says how --search is done, which asks for nothing"),
        ({"widths": {"blocks": {"0": {"mlp": 3}}}, "sparsity": None}, "would decide the same thing"),
        ({"method": "depth", "sparsity": 0.5}, "no meaning for method 'depth'"),
    ],
)
def test_what_a_search_cannot_be_asked_with(
    model: Path, text_file: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, UnsupportedError), match=message):
        plan(model, recipe(text_file, **{"search_generations": 2, **changes}))
