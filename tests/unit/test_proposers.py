"""Searches on losses that are known: budgets are never broken, seeds decide, and the best choice is approached."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structprune.allocation.knapsack import dynamic_programming
from structprune.allocation.menu import Budget, Choice, Slot, Variant, total_cost, total_price
from structprune.allocation.proposers import SEARCHES, Measured, Proposer
from structprune.allocation.proposers.levels import adapted, kept_shares, place_of, shifted, stepped, thinned
from structprune.kinds import UnitKind

Fitness = Callable[[Choice], float]
FULL = {"attention": (8, 60), "mlp": (48, 10)}
"""Kind -> units and what each adds to the sum."""


def make_slots(num_blocks: int, kinds: Sequence[UnitKind] = ("attention", "mlp"), seed: int = 0) -> list[Slot]:
    """Convex prices of unequal height; every width but the empty one."""
    random = np.random.default_rng(seed)
    slots: list[Slot] = []
    for block in range(num_blocks):
        for kind in kinds:
            units, cost = FULL[kind]
            height = float(np.exp(random.normal()))
            variants = [
                Variant(keep=keep, cost=(keep * cost,), price=height * (1 - keep / units) ** 2 * cost * units / 480)
                for keep in range(units, 0, -1)
            ]
            slots.append(Slot(block=block, kind=kind, variants=tuple(variants)))
    return slots


def budget_of(slots: Sequence[Slot], share: float) -> Budget:
    return Budget(at_most=(int(share * sum(slot.variants[0].cost[0] for slot in slots)),))


def run(proposer: Proposer, fitness: Fitness) -> list[Choice]:
    """Carry out a search without halving; returns everything that was asked for."""
    asked: list[Choice] = []
    while choices := proposer.ask():
        assert len(set(choices)) == len(choices)
        asked += choices
        first = [Measured(choice=choice, losses=(fitness(choice),)) for choice in choices]
        best = Measured(choice=proposer.best(), losses=(fitness(proposer.best()),))
        proposer.tell([first, [*first, best]])
    return asked


def even_start(slots: Sequence[Slot], budget: Budget) -> Choice:
    start = shifted(slots, [0.5] * len(slots), budget)
    assert start is not None
    return start


@settings(deadline=None, max_examples=25)
@given(num_blocks=st.integers(2, 5), share=st.floats(0.3, 0.9), seed=st.integers(0, 5))
@pytest.mark.parametrize("name", list(SEARCHES))
def test_every_choice_is_within_the_budget(name: str, num_blocks: int, share: float, seed: int) -> None:
    slots = make_slots(num_blocks, seed=seed)
    budget = budget_of(slots, share)
    start = even_start(slots, budget)
    search = SEARCHES.get(name)
    proposer = search.propose(slots, budget, start, search.options(2, 4, seed))
    asked = run(proposer, lambda choice: total_price(slots, choice))
    assert all(budget.met(slots, choice) for choice in [*asked, proposer.best()])


@pytest.mark.parametrize("name", list(SEARCHES))
def test_a_search_is_repeated_by_what_it_was_told(name: str) -> None:
    """A process that goes on with a search tells what was measured before, and is asked for the same choices."""
    slots = make_slots(4)
    budget, search = budget_of(slots, 0.5), SEARCHES.get(name)
    runs = [
        run(
            search.propose(slots, budget, even_start(slots, budget), search.options(3, 4, 7)),
            lambda choice: total_price(slots, choice),
        )
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("name", "generations"),
    [("evopress", 40), ("tyr", 40), ("darwinlm", 40), ("bypass", 40), ("spdy", 10), ("regression", 4)],
)
def test_losses_that_were_predicted_wrongly_are_corrected(name: str, generations: int) -> None:
    """True losses are predicted ones times a factor per slot: the search goes at least halfway to their optimum."""
    slots = make_slots(6)
    factors = np.exp(np.random.default_rng(1).normal(0, 1, len(slots)))
    budget, search = budget_of(slots, 0.5), SEARCHES.get(name)

    def fitness(choice: Choice) -> float:
        prices = [slot.variants[place].price for slot, place in zip(slots, choice, strict=True)]
        return float(np.dot(factors, prices))

    scaled = [
        Slot(
            block=slot.block,
            kind=slot.kind,
            variants=tuple(Variant(keep=v.keep, cost=v.cost, price=v.price * float(factor)) for v in slot.variants),
        )
        for slot, factor in zip(slots, factors, strict=True)
    ]
    optimum = fitness(dynamic_programming(scaled, budget))
    start = dynamic_programming(slots, budget)
    proposer = search.propose(slots, budget, start, search.options(generations, 16, 0))
    run(proposer, fitness)
    assert fitness(proposer.best()) - optimum < 0.5 * (fitness(start) - optimum)


def test_children_of_the_null_test_come_from_the_start_alone() -> None:
    """No choice is further from the start than its swaps are, whatever was found before."""
    slots = make_slots(8, kinds=["mlp"])
    budget, search = budget_of(slots, 0.5), SEARCHES.get("random")
    start = even_start(slots, budget)
    asked = run(
        search.propose(slots, budget, start, search.options(10, 8, 0)), lambda choice: total_price(slots, choice)
    )
    assert max(sum(a != b for a, b in zip(choice, start, strict=True)) for choice in asked) <= 8
    assert all(total_cost(slots, choice) == total_cost(slots, start) for choice in asked)


def test_all_blocks_of_a_grid_have_one_shape() -> None:
    slots = make_slots(4)
    budget, search = budget_of(slots, 0.5), SEARCHES.get("grid")
    assert search.even
    proposer = search.propose(slots, budget, dynamic_programming(slots, budget), search.options(None, None, 0))
    asked = run(proposer, lambda choice: total_price(slots, choice))
    assert 1 < len(asked) <= search.children
    for choice in [*asked, proposer.best()]:
        shares = {(slot.kind, share) for slot, share in zip(slots, kept_shares(slots, choice), strict=True)}
        assert len(shares) == 2
    # The one of least predicted loss is first.
    assert asked[0] == min(asked, key=lambda choice: total_price(slots, choice))


def test_a_protected_block_stays_whole_in_a_grid() -> None:
    slots = make_slots(4)
    slots[0] = Slot(block=0, kind="attention", variants=slots[0].variants[:1])
    budget, search = budget_of(slots, 0.6), SEARCHES.get("grid")
    proposer = search.propose(slots, budget, even_start(slots, budget), search.options(None, None, 0))
    assert all(choice[0] == 0 and budget.met(slots, choice) for choice in proposer.ask())


def test_shares_of_a_progression_change_evenly() -> None:
    slots = make_slots(5, kinds=["mlp"])
    budget, search = budget_of(slots, 0.5), SEARCHES.get("progression")
    proposer = search.propose(slots, budget, even_start(slots, budget), search.options(None, None, 0))
    for choice in proposer.ask():
        steps = np.diff(kept_shares(slots, choice))
        # A unit of 48 by rounding and one for what was left; clamped ends are flat.
        free = steps[(steps > 1e-9) | (steps < -1e-9)]
        assert free.max(initial=-1) - free.min(initial=1) < 3 / 48 or len(free) < len(steps)


def test_steps_of_a_slot() -> None:
    slot = make_slots(1, kinds=["mlp"])[0]
    keeps = [variant.keep for variant in slot.variants]
    assert keeps[stepped(slot, 0, 0.25) or 0] == 36
    assert keeps[stepped(slot, keeps.index(36), -0.25) or 0] == 48
    assert stepped(slot, 0, -0.25) is None
    assert stepped(slot, len(keeps) - 1, 0.25) is None
    # Less than a unit is a unit.
    assert stepped(slot, 5, 0.001) == 6
    assert keeps[place_of(slot, 0.5)] == 24
    assert keeps[place_of(slot, 0.0)] == 1
    coarse, places = thinned([slot], 0.25)
    assert [variant.keep for variant in coarse[0].variants] == [48, 36, 24, 12, 1]
    assert places == [[0, 12, 24, 36, 47]]


def test_what_a_slot_leaves_the_other_one_takes() -> None:
    slots = make_slots(2, kinds=["mlp"])
    budget = budget_of(slots, 0.5)
    assert adapted(slots, (0, 0), 1, budget) is None
    choice = adapted(slots, (12, 0), 1, budget)
    assert choice is not None
    assert total_cost(slots, choice) == budget.at_most
