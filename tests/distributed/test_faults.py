"""A rank that dies, hangs or is another one ends the run everywhere, is named, and the run can go on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launch import Ended, largest_difference, masks, run_ranks, settings

from structprune.api import prune, resume
from structprune.recipe import Recipe
from support.models import save_tiny

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("one_thread")]

# Threads of a busy machine may stand still for seconds.
LIMIT_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A model of three blocks, a recipe, and what it gives on one process."""

    model: Path
    recipe: dict[str, Any]
    whole: Path


@pytest.fixture(scope="module")
def place(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    base = tmp_path_factory.mktemp("faults")
    recipe = settings(text_file)
    model = save_tiny("llama", base / "model", num_blocks=3)
    prune(model, Recipe.build(**recipe), base / "whole")
    return Place(model=model, recipe=recipe, whole=base / "whole")


def run(place: Place, folder: Path, size: int, deeds: dict[int, list[list[Any]]], **spec: Any) -> Ended:
    everyone = [["snapshots", "inf"]]
    given = {str(rank): everyone + deeds.get(rank, []) for rank in range(size)}
    one = {"model": place.model, "recipe": place.recipe, "output": folder / "out", "deeds": given, "timeout": LIMIT_S}
    return run_ranks(size, [one], folder / "said", **spec)


def error_of(ended: Ended, rank: int) -> dict[str, Any]:
    return ended.said[0][rank]["error"]


def check_goes_on(place: Place, folder: Path, size: int) -> None:
    """On `size` ranks, to the result of a run that nothing happened to."""
    if size == 1:
        resume(folder / "out")
    else:
        one = {"model": place.model, "recipe": place.recipe, "output": folder / "out", "timeout": 60}
        ended = run_ranks(size, [one], folder / "again")
        assert set(ended.codes.values()) == {0}, ended
    assert masks(folder / "out") == masks(place.whole)
    assert largest_difference(folder / "out", place.whole) < 1e-4
    assert not (folder / "out.partial").exists()


@pytest.mark.parametrize("goes_on_with", [1, 2, 3])
def test_a_rank_that_is_killed(goes_on_with: int, place: Place, tmp_path: Path) -> None:
    ended = run(place, tmp_path, 2, {1: [["die", 2]]})
    assert ended.codes == {0: 2, 1: -9}, ended
    assert error_of(ended, 0)["error"] == "RankError"
    assert "rank 1 is gone" in error_of(ended, 0)["text"]
    assert "`structprune resume` goes on" in error_of(ended, 0)["text"]
    # Its snapshot is behind the second block, of all windows.
    assert (tmp_path / "out.partial" / "state" / "2.pruned").stat().st_size == 5 * 32 * 32 * 4
    check_goes_on(place, tmp_path, goes_on_with)


@pytest.mark.parametrize("goes_on_with", [1, 3])
def test_a_rank_that_is_killed_in_the_survey(goes_on_with: int, place: Place, tmp_path: Path) -> None:
    ended = run(place, tmp_path, 2, {1: [["die-in-survey", 0]]})
    assert ended.codes == {0: 2, 1: -9}, ended
    sensitivity = tmp_path / "out.partial" / "survey"
    # Behind the first two of three blocks, in one file for all windows.
    assert (sensitivity / "gradient" / "1.gradient").stat().st_size == 3 * 32 * 32 * 4
    assert (sensitivity / "border-3.bin").stat().st_size == 3 * 32 * 32 * 4
    check_goes_on(place, tmp_path, goes_on_with)


def test_the_first_rank_is_killed(place: Place, tmp_path: Path) -> None:
    """It keeps the store."""
    ended = run(place, tmp_path, 3, {0: [["die", 1]]})
    assert ended.codes == {0: -9, 1: 2, 2: 2}, ended
    for rank in (1, 2):
        assert "(rank 0) is gone" in error_of(ended, rank)["text"]
    check_goes_on(place, tmp_path, 2)


def test_a_rank_that_stands_still(place: Place, tmp_path: Path) -> None:
    ended = run(place, tmp_path, 3, {2: [["stop", 1]]}, stopped=1)
    assert ended.codes == {0: 2, 1: 2}, ended
    for rank in (0, 1):
        assert f"rank 2 has given no sign of life for {LIMIT_S:g} s" in error_of(ended, rank)["text"]
        assert ended.said[0][rank]["seconds"] < 60
    check_goes_on(place, tmp_path, 1)


def test_a_rank_that_lives_and_does_not_come(place: Place, tmp_path: Path) -> None:
    ended = run(place, tmp_path, 2, {1: [["hang", 1]]})
    # The one that hangs is ended by its own heartbeat.
    assert ended.codes == {0: 2, 1: 2}, ended
    assert "rank 1 is alive but has not come to step" in error_of(ended, 0)["text"]
    assert "rank 1 is alive but has not come to step" in ended.errors
    check_goes_on(place, tmp_path, 2)


def test_a_rank_that_fails(place: Place, tmp_path: Path) -> None:
    ended = run(place, tmp_path, 2, {1: [["fail", 1]]})
    assert ended.codes == {0: 2, 1: 2}, ended
    assert error_of(ended, 0)["error"] == "RankError"
    assert "rank 1 ended with ValueError: a thing of its own" in error_of(ended, 0)["text"]
    assert ended.said[0][0]["seconds"] < LIMIT_S + 20
    check_goes_on(place, tmp_path, 1)


def test_a_rank_that_does_not_come_at_all(place: Place, tmp_path: Path) -> None:
    ended = run(place, tmp_path, 3, {1: [["leave", 0]]})
    assert ended.codes == {0: 2, 1: 0, 2: 2}, ended
    for rank in (0, 2):
        assert f"rank 1 of 3 did not come within {LIMIT_S:g} s" in error_of(ended, rank)["text"]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        (["version", "9.9.9"], "rank 1 has another version of structprune than rank 0; got 9.9.9"),
        (["recipe", {"sparsity": 0.5}], "rank 1 has another --sparsity than rank 0; got 0.5, wanted 0.3"),
        (["model", "other"], "rank 1 has another source checkpoint than rank 0"),
    ],
    ids=["version", "recipe", "source"],
)
def test_a_rank_that_is_another_one(deed: list[Any], said: str, place: Place, tmp_path: Path) -> None:
    if deed[0] == "model":
        other = save_tiny("llama", tmp_path / "other", num_blocks=2)
        deed = ["model", str(other)]
    ended = run(place, tmp_path, 2, {1: [deed]})
    assert ended.codes == {0: 2, 1: 2}, ended
    for rank in (0, 1):
        assert error_of(ended, rank)["error"] == "InputError"
        assert said in error_of(ended, rank)["text"]
        # Told once.
        assert error_of(ended, rank)["elsewhere"] == (rank == 1)
    assert not (tmp_path / "out.partial").exists()
