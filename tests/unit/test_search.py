"""A search over widths without a model: which windows it has, and what is made of its measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from structprune.allocation.proposers import SEARCHES, Measured, Rung
from structprune.calibration.context import CalibrationWindows, TextWindows
from structprune.engine.planning.searching import search_work, stores_at_once, window_shares
from structprune.engine.search.judge import compared, figure, harms_none
from structprune.engine.search.windows import shared_out
from structprune.errors import InputError
from structprune.results.search import SearchReport
from structprune.results.texts import TextDistance
from structprune.texts import OBJECTIVES

MEAN, WORST = OBJECTIVES["mean"], OBJECTIVES["worst"]


def windows(counts: Sequence[int]) -> CalibrationWindows:
    """Windows of several texts, which take turns."""
    order = sorted((place / count, text) for text, count in enumerate(counts) for place in range(count))
    texts = tuple(
        TextWindows(
            name=str(text),
            description="",
            weight=1.0,
            windows=tuple(number for number, (_, of) in enumerate(order) if of == text),
            held_out=(),
        )
        for text in range(len(counts))
    )
    return CalibrationWindows(
        ids_NS=torch.zeros(sum(counts), 64, dtype=torch.int64), description="", texts=texts if len(counts) > 1 else ()
    )


@pytest.mark.parametrize("counts", [[24], [4], [12, 12, 12], [9, 4, 20]])
def test_no_window_has_two_parts(counts: Sequence[int]) -> None:
    found = shared_out(windows(counts), 6)
    judged = [number for text in found.judged for number in text]
    measured = [number for text in found.measured for number in text]
    assert sorted([*found.fitted, *measured, *judged]) == list(range(sum(counts)))
    assert found.unfitted == tuple(sorted([*measured, *judged]))
    assert all(len(text) == count // 4 for text, count in zip(found.judged, counts, strict=True))
    assert len(found.fitted) == sum(min(count // 2, math.ceil(6 / len(counts))) for count in counts)


def test_every_round_draws_anew_as_many_windows_of_each_text() -> None:
    found = shared_out(windows([40, 40, 12]), 6)
    rung = Rung(windows=7)
    drawn = [found.drawn(rung, (0, generation, 0)) for generation in range(8)]
    assert all([len(text) for text in each] == [3, 3, 3] for each in drawn)
    assert all(set(text) <= set(pool) for each in drawn for text, pool in zip(each, found.measured, strict=True))
    assert len({each[0] for each in drawn}) > 5
    assert found.drawn(rung, (0, 3, 0)) == drawn[3]
    # A text that has fewer gives all of them.
    assert [len(text) for text in found.drawn(Rung(windows=300), (0, 0, 0))] == [len(p) for p in found.measured]


def test_too_few_windows() -> None:
    with pytest.raises(InputError, match="too few calibration windows for a search"):
        shared_out(windows([8, 3]), 4)
    assert window_shares(4, 24, 1, 64).measured == 1


def test_what_runs_together_takes_no_more_room_than_the_pass_that_prunes() -> None:
    assert [stores_at_once(96, 8, candidates) for candidates in (1, 12, 13, 40)] == [1, 12, 12, 12]
    # One runs in any case.
    assert stores_at_once(4, 8, 3) == 1
    search = SEARCHES.get("evopress")
    work = search_work(search, search.options(3, 5, 0), num_windows=60, backward=24, num_texts=5, seq_len=64)
    # The best one so far and the start are in the last round.
    assert work.rounds == ((5, 5), (6, 10))
    assert (work.windows.fitted, work.windows.judged) == (25, 15)


def test_the_standard_error_of_a_mean_is_that_of_the_paired_differences() -> None:
    random = np.random.default_rng(0)
    before, after = random.normal(3, 1, 12), random.normal(2.5, 1, 12)
    found = compared(before.tolist(), after.tolist(), [0] * 12, MEAN)
    assert found.gain == pytest.approx((before - after).mean())
    assert found.standard_error == pytest.approx((before - after).std(ddof=1) / math.sqrt(12))


def test_the_gain_of_the_worst_text_is_told_with_its_error() -> None:
    texts = [0, 0, 0, 1, 1, 1]
    before, after = [1.0, 1.2, 0.8, 3.0, 3.1, 2.9], [1.5, 1.6, 1.4, 2.0, 2.2, 1.8]
    assert figure(before, texts, WORST) == pytest.approx(3.0)
    found = compared(before, after, texts, WORST)
    assert found.gain == pytest.approx(1.0)
    assert found.counts
    # The mean gains less.
    assert compared(before, after, texts, MEAN).gain == pytest.approx(0.25)


def test_a_text_that_loses_speaks_against_a_choice_of_the_mean() -> None:
    texts, before, after = [0, 0, 1, 1], [1.0, 1.2, 3.0, 3.1], [1.1, 1.2, 2.0, 2.1]
    assert compared(before, after, texts, MEAN).gain == pytest.approx(0.475)
    assert not harms_none(before, after, texts, MEAN)
    assert harms_none(before, after, texts, WORST)
    # Of single windows some may lose.
    assert harms_none(before, [1.3, 0.9, 2.0, 2.1], texts, MEAN)


@pytest.mark.parametrize(("shift", "counts"), [(0.0, False), (0.02, False), (1.0, True)])
def test_a_gain_counts_from_two_standard_errors(shift: float, counts: bool) -> None:
    random = np.random.default_rng(1)
    before = random.normal(3, 1, 16)
    after = before - shift + random.normal(0, 0.2, 16)
    assert compared(before.tolist(), after.tolist(), [0] * 16, MEAN).counts is counts


def test_one_window_tells_no_error() -> None:
    assert not compared([3.0], [1.0], [0], MEAN).counts
    assert not compared([3.0, 3.0, 2.0], [1.0, 1.0, 1.0], [0, 0, 1], MEAN).counts


def test_a_choice_is_judged_by_its_figure_where_it_has_one() -> None:
    assert Measured(choice=(0,), losses=(1.0, 3.0)).loss == 2.0
    assert Measured(choice=(0,), losses=(1.0, 3.0), figure=3.0).loss == 3.0


def test_the_report_says_which_text_spoke_against_a_gain() -> None:
    texts = [
        TextDistance(name="folder/prose.txt", num_windows=2, before=0.5, after=0.4),
        TextDistance(name="folder/code.py", num_windows=2, before=0.3, after=0.31),
    ]
    found = SearchReport(
        name="tyr",
        generations=[],
        num_measured=9,
        finalist_losses=[0.355],
        num_windows=4,
        seq_len=8,
        start_loss=0.4,
        found_loss=0.355,
        gain=0.045,
        standard_error=0.01,
        taken=False,
        clear=True,
        texts=texts,
        num_masks=4,
        masks_better=0,
        masks_loss=0.5,
        start_widths={},
        found_widths={},
        seconds=60.0,
    )
    assert "prose.txt 0.5000 -> 0.4000, code.py 0.3000 -> 0.3100" in found.line
    assert "further from it on code.py, so the start stays" in found.line
    assert "not two standard errors, so the start stays" in found.model_copy(update={"clear": False}).line
