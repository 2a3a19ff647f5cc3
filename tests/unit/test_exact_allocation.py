"""Exact allocators against brute force: the least loss that meets the limits, to the unit; the path beside them."""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structprune.allocation import ALLOCATORS, AllocationOptions, BlockBudget, knapsack
from structprune.allocation.budget import Sizes
from structprune.allocation.knapsack import dynamic_programming
from structprune.allocation.menu import Budget, Choice, Slot, Variant, make_menu, total_cost, total_price
from structprune.allocation.mixed_integer import mixed_integer
from structprune.allocation.path import lagrangian_path
from structprune.errors import InputError, UnsupportedError

needs_scipy = pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="needs the extra milp")


@st.composite
def menus(draw: st.DrawFn, num_costs: int = 1) -> list[Slot]:
    """Up to six slots of up to four widths; prices need be neither smooth nor ascending, and their sums are exact.

    Eighths: where sums are rounded, which of two choices is the cheaper depends on the order of the additions.
    """
    slots: list[Slot] = []
    for block in range(draw(st.integers(1, 6))):
        count = draw(st.integers(1, 4))
        costs = [
            sorted(draw(st.lists(st.integers(0, 30), min_size=count, max_size=count, unique=True)), reverse=True)
            for _ in range(num_costs)
        ]
        prices = [0.0, *draw(st.lists(st.integers(-2, 40), min_size=count - 1, max_size=count - 1))]
        variants = [
            Variant(keep=count - place, cost=tuple(column[place] for column in costs), price=prices[place] / 8)
            for place in range(count)
        ]
        slots.append(Slot(block=block, kind="mlp", variants=tuple(variants)))
    return slots


def all_choices(slots: Sequence[Slot]) -> list[Choice]:
    return list(itertools.product(*(range(len(slot.variants)) for slot in slots)))


def least_price(slots: Sequence[Slot], budget: Budget) -> float | None:
    prices = [total_price(slots, choice) for choice in all_choices(slots) if budget.met(slots, choice)]
    return min(prices, default=None)


@settings(deadline=None, max_examples=150)
@given(slots=menus(), share=st.floats(0, 1.1))
def test_dynamic_programming_is_brute_force(slots: list[Slot], share: float) -> None:
    """The least price, and of the choices with that price the one that removes least."""
    budget = Budget(at_most=(int(share * sum(slot.variants[0].cost[0] for slot in slots)),))
    best = least_price(slots, budget)
    if best is None:
        with pytest.raises(InputError, match="no choice of widths meets the limit"):
            dynamic_programming(slots, budget)
        return
    choice = dynamic_programming(slots, budget)
    assert budget.met(slots, choice)
    assert total_price(slots, choice) == pytest.approx(best, abs=1e-12)
    as_cheap = [c for c in all_choices(slots) if budget.met(slots, c) and total_price(slots, c) < best + 1e-9]
    assert total_cost(slots, choice) == max(total_cost(slots, c) for c in as_cheap)


@needs_scipy
@settings(deadline=None, max_examples=60)
@given(slots=menus(num_costs=2), shares=st.tuples(st.floats(0, 1.1), st.floats(0, 1.1)))
def test_mixed_integer_is_brute_force(slots: list[Slot], shares: tuple[float, float]) -> None:
    dense = total_cost(slots, (0,) * len(slots))
    budget = Budget(at_most=tuple(int(share * size) for share, size in zip(shares, dense, strict=True)))
    best = least_price(slots, budget)
    if best is None:
        with pytest.raises(InputError, match="no choice of widths"):
            mixed_integer(slots, budget)
        return
    choice = mixed_integer(slots, budget)
    assert budget.met(slots, choice)
    assert total_price(slots, choice) == pytest.approx(best, abs=1e-9)


@needs_scipy
@settings(deadline=None, max_examples=40)
@given(slots=menus(), share=st.floats(0, 1.1))
def test_with_one_limit_both_are_as_cheap(slots: list[Slot], share: float) -> None:
    budget = Budget(at_most=(int(share * sum(slot.variants[0].cost[0] for slot in slots)),))
    if least_price(slots, budget) is None:
        return
    prices = [total_price(slots, solve(slots, budget)) for solve in (dynamic_programming, mixed_integer)]
    assert prices[0] == pytest.approx(prices[1], abs=1e-9)


@settings(deadline=None, max_examples=150)
@given(slots=menus())
def test_every_point_of_the_path_is_the_best_of_its_size(slots: list[Slot]) -> None:
    path = lagrangian_path(slots)
    for point in path.points:
        choice = path.within(point.cost)
        assert choice is not None
        assert total_cost(slots, choice) == (point.cost,)
        assert total_price(slots, choice) == pytest.approx(point.price, abs=1e-9)
        best = dynamic_programming(slots, Budget(at_most=(point.cost,)))
        assert total_price(slots, best) == pytest.approx(point.price, abs=1e-9)


@settings(deadline=None, max_examples=150)
@given(slots=menus(), share=st.floats(0, 1.1))
def test_the_path_is_within_one_step_of_the_best(slots: list[Slot], share: float) -> None:
    """No cheaper than the best choice, and no dearer than that under the limit that the path's own point keeps to."""
    limit = int(share * sum(slot.variants[0].cost[0] for slot in slots))
    path = lagrangian_path(slots)
    choice = path.within(limit)
    if least_price(slots, Budget(at_most=(limit,))) is None:
        assert choice is None
        return
    assert choice is not None
    (reached,) = total_cost(slots, choice)
    assert reached <= limit
    costs = [path.start_cost, *(point.cost for point in path.points)]
    if reached < limit and reached != path.start_cost:
        # One step back is too large.
        assert costs[costs.index(reached) - 1] > limit
    best = total_price(slots, dynamic_programming(slots, Budget(at_most=(limit,))))
    below = total_price(slots, dynamic_programming(slots, Budget(at_most=(reached,))))
    assert best - 1e-9 <= total_price(slots, choice) <= below + 1e-9


def budgets_of(costs: Sequence[Sequence[float]], unit_size: int = 3, **changes: int) -> list[BlockBudget]:
    return [
        BlockBudget(
            block=block,
            kind="mlp",
            num_units=len(row),
            unit_size=unit_size,
            module_size=len(row) * unit_size,
            cost_U=torch.tensor(row, dtype=torch.float64),
            **changes,
        )
        for block, row in enumerate(costs)
    ]


@settings(deadline=None, max_examples=60)
@given(
    costs=st.lists(st.lists(st.floats(0, 1), min_size=12, max_size=12), min_size=1, max_size=5),
    sparsity=st.floats(0.01, 0.6),
    multiple_of=st.sampled_from([1, 3, 4]),
)
def test_no_allocator_is_cheaper(costs: list[list[float]], sparsity: float, multiple_of: int) -> None:
    budgets, options = budgets_of(costs, multiple_of=multiple_of), AllocationOptions(sparsity=sparsity)

    def price(name: str) -> float:
        kept = ALLOCATORS.get(name).allocate(budgets, options)
        return sum(sum(row[: len(row) - count]) for row, count in zip(costs, kept, strict=True))

    for name in ("closed-form", "fermi-dirac", "softmax"):
        assert price("dp") <= price(name) + 1e-9


def test_prices_that_are_not_convex_are_seen_through() -> None:
    """The first unit of block 0 is dear and the others nearly free: taken together they are the cheapest four."""
    budgets = budgets_of([[0.5, 0.01, 0.01, 0.01, 9.0], [0.2] * 5])
    options = AllocationOptions(sparsity=0.4, min_retention=0.2)
    assert ALLOCATORS.get("dp").allocate(budgets, options) == [1, 5]
    assert ALLOCATORS.get("dp").allocate(budgets, AllocationOptions(sparsity=0.2, min_retention=0.2)) == [5, 3]


def test_what_goes_with_the_last_unit_counts() -> None:
    """A norm of 3 goes with a whole sublayer, as much as one more unit."""
    budgets = budgets_of([[0.1, 0.1], [0.3, 0.3]], rest_size=3)
    options = AllocationOptions(sparsity=0.0, removal=9, allow_removal=True)
    assert ALLOCATORS.get("dp").allocate(budgets, options) == [0, 2]
    # The others know of units only, and remove a third one.
    assert ALLOCATORS.get("closed-form").allocate(budgets, options) == [0, 1]


@needs_scipy
def test_several_limits_are_held() -> None:
    """Units of block 1 are dear in the second sum, those of block 0 in the first."""
    further = (Sizes(unit=1), Sizes(unit=10))
    budgets = [
        BlockBudget(
            block=block,
            kind="mlp",
            num_units=10,
            unit_size=size,
            module_size=10 * size,
            cost_U=torch.linspace(0.1, 1.0, 10, dtype=torch.float64),
            further=(more,),
        )
        for block, (size, more) in enumerate(zip((5, 1), further, strict=True))
    ]
    options = AllocationOptions(sparsity=0.0, removal=20, further=(40,), min_retention=0.1)
    # Four of each: 4 * 5 + 4 of the first sum, 4 + 4 * 10 of the second.
    assert ALLOCATORS.get("milp").allocate(budgets, options) == [6, 6]


def test_scipy_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"allocator 'milp' needs .*; got no scipy.*structprune\[milp\]"):
        ALLOCATORS.get("milp").check("milp")


def rising_menu(num_slots: int, num_widths: int, num_units: int) -> list[Slot]:
    """Slots of unequal width with smooth prices, whose costs have no common unit but one."""
    random = np.random.default_rng(0)
    slots: list[Slot] = []
    for block in range(num_slots):
        size = num_units // num_slots + block % 7
        prices = np.cumsum([0.0, *random.random(num_widths - 1) ** 3])
        variants = [
            Variant(keep=num_widths - place, cost=(size - size * place // num_widths,), price=float(prices[place]))
            for place in range(num_widths)
        ]
        slots.append(Slot(block=block, kind="mlp", variants=tuple(variants)))
    return slots


def test_sixty_slots_take_a_tenth_of_a_second() -> None:
    slots = rising_menu(60, 9, 22_000)
    budget = Budget(at_most=(11_000,))
    seconds: list[float] = []
    for _ in range(3):
        before = time.process_time()
        dynamic_programming(slots, budget)
        seconds.append(time.process_time() - before)
    assert min(seconds) < 0.1


def test_a_table_that_would_be_too_large_is_rounded_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs in units of 22: the limit is met, and the loss is that of a limit lower by a unit for each slot at most."""
    slots = rising_menu(12, 9, 22_000)
    budget = Budget(at_most=(11_000,))
    exact = dynamic_programming(slots, budget)
    monkeypatch.setattr(knapsack, "_MOST_STATES", 500)
    rounded = dynamic_programming(slots, budget)
    assert budget.met(slots, rounded)
    lower = dynamic_programming(slots, Budget(at_most=(11_000 - 12 * 23,)))
    assert total_price(slots, exact) <= total_price(slots, rounded) <= total_price(slots, lower) + 1e-9
    monkeypatch.undo()
    monkeypatch.setattr(knapsack, "_MOST_STEPS", 10_000)
    assert budget.met(slots, dynamic_programming(slots, budget))


def test_the_menu_is_what_the_groups_may_keep() -> None:
    (budget,) = budgets_of([[1.0, 2.0, 3.0, 4.0, 5.0]], multiple_of=2, rest_size=7)
    slots, limits = make_menu([budget], AllocationOptions(sparsity=0.2, allow_removal=True))
    assert [(v.keep, v.cost, v.price) for v in slots[0].variants] == [
        (5, (22,), 0.0),
        (4, (19,), 1.0),
        (2, (13,), 6.0),
        (0, (0,), 15.0),
    ]
    assert limits.at_most == (19,)
