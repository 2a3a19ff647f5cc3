"""Predicted losses corrected by measurements: what is measured is met, and pairs of neighbours count."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from structprune.allocation.corrected import Anchors
from structprune.allocation.knapsack import dynamic_programming
from structprune.allocation.menu import Budget, Choice, Slot, Variant
from structprune.engine.search.anchors import measure_anchors


def make_slots(num_blocks: int, seed: int = 0, *, may_go: bool = True) -> list[Slot]:
    """Slots of four units that cost one each, with convex prices of unequal height."""
    random = np.random.default_rng(seed)
    keeps = range(4, -1 if may_go else 0, -1)
    return [
        Slot(
            block=block,
            kind="mlp",
            variants=tuple(Variant(keep=keep, cost=(keep,), price=height * (1 - keep / 4) ** 2) for keep in keeps),
        )
        for block, height in enumerate(random.lognormal(0, 0.5, num_blocks).tolist())
    ]


def measured(slots: Sequence[Slot], choice: Choice, factors: Sequence[float], excess: float) -> float:
    """A loss with factors, off its curve without units, and larger where neighbours are both gone."""
    total, gone = 0.0, [slot.variants[place].keep == 0 for slot, place in zip(slots, choice, strict=True)]
    for slot, place, factor in zip(slots, choice, factors, strict=True):
        total += slot.variants[place].price * factor * (1.5 if slot.variants[place].keep == 0 else 1.0)
    return total + excess * sum(one and other for one, other in itertools.pairwise(gone))


def anchors_of(slots: Sequence[Slot], start: Choice, factors: Sequence[float], excess: float) -> Anchors:
    return measure_anchors(slots, start, lambda choices: [measured(slots, each, factors, excess) for each in choices])


@pytest.mark.parametrize("seed", range(6))
def test_a_loss_of_this_form_is_known_from_its_anchors(seed: int) -> None:
    slots = make_slots(5, seed)
    factors = np.random.default_rng(seed + 50).lognormal(0, 0.5, 5).tolist()
    # At the smallest width that keeps some units.
    anchors = anchors_of(slots, (3, 3, 3, 3, 3), factors, 0.7)
    assert set(anchors.gone) == set(range(5))
    assert set(anchors.pairs) == {(0, 1), (1, 2), (2, 3), (3, 4)}
    corrected = anchors.corrected(slots)
    for choice in itertools.product(range(5), repeat=5):
        assert anchors.loss(corrected, choice) == pytest.approx(measured(slots, choice, factors, 0.7))


@pytest.mark.parametrize("excess", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_pairs_are_counted_in_the_choice(seed: int, excess: float) -> None:
    slots, budget = make_slots(5, seed), Budget(at_most=(8,))
    factors = [1.0] * 5
    anchors = anchors_of(slots, (1,) * 5, factors, excess)
    corrected = anchors.corrected(slots)
    chosen = anchors.choose(corrected, budget)
    assert budget.met(slots, chosen)
    losses = {
        choice: measured(slots, choice, factors, excess)
        for choice in itertools.product(range(5), repeat=5)
        if budget.met(slots, choice)
    }
    # Never worse than without the pairs, and near the best of all.
    assert losses[chosen] <= losses[dynamic_programming(corrected, budget)] + 1e-9
    assert losses[chosen] <= 1.25 * min(losses.values()) + 1e-9


def test_neighbours_that_compensate_one_another_do_not_both_go() -> None:
    """Each of the four is cheap to lose alone; the first two are dear together."""
    heights = (0.1, 0.1, 0.12, 9.0)
    slots = [
        Slot(
            block=block,
            kind="mlp",
            variants=(Variant(keep=1, cost=(1,), price=0.0), Variant(keep=0, cost=(0,), price=height)),
        )
        for block, height in enumerate(heights)
    ]
    pairs = {(0, 1): 3.0, (1, 2): 0.25, (2, 3): 9.2}
    anchors = Anchors(partial={}, gone=dict(enumerate(heights)), pairs=pairs)
    assert dynamic_programming(slots, Budget(at_most=(2,))) == (1, 1, 0, 0)
    assert anchors.choose(anchors.corrected(slots), Budget(at_most=(2,))) in {(1, 0, 1, 0), (0, 1, 1, 0)}


def test_below_the_measured_width_predictions_are_not_lowered() -> None:
    """A slot of a low factor at half width may still lose what was predicted of its last units."""
    slots = make_slots(3, may_go=False)
    losses = {0: 3.0, 1: 2.0, 2: 0.1}
    partial = {number: (2, factor * slots[number].variants[2].price) for number, factor in losses.items()}
    corrected = Anchors(partial=partial).corrected(slots)
    for number, (above, below) in {0: (3.0, 3.0), 1: (2.0, 2.0), 2: (0.1, 2.0)}.items():
        before, after = ([variant.price for variant in each[number].variants] for each in (slots, corrected))
        assert after[:3] == pytest.approx([above * price for price in before[:3]])
        assert after[3] - after[2] == pytest.approx(below * (before[3] - before[2]))


def test_slots_that_may_not_go_have_one_measurement_each() -> None:
    slots, asked = make_slots(4, may_go=False), list[Choice]()

    def losses(choices: Sequence[Choice]) -> list[float]:
        asked.extend(choices)
        return [2.0] * len(choices)

    anchors = measure_anchors(slots, (0, 3, 2, 0), losses)
    # Widths of the start where it cuts, else the share that the start keeps of all: eleven units of sixteen.
    assert asked == [(1, 0, 0, 0), (0, 3, 0, 0), (0, 0, 2, 0), (0, 0, 0, 1)]
    assert not anchors.gone
    assert not anchors.pairs
    corrected = anchors.corrected(slots)
    assert [corrected[n].variants[p].price for n, p in enumerate((1, 3, 2, 1))] == pytest.approx([2.0] * 4)
    assert corrected[0].variants[0].price == 0.0
