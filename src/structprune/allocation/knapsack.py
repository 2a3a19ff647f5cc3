"""The choice of least predicted loss under one limit, by dynamic programming.

A multiple-choice knapsack: one variant of every slot, sum of costs at most the limit, sum of prices least. State j of
slot g is the least price at which the first g slots give exactly j cost units less than all slots at their largest. It
is exact in whole cost units, whatever the prices look like: they need be neither smooth nor convex, as those of
attention heads and of whole sublayers are not. The closed form of `across.py` is its relaxation.

Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), chapter 11. Shape suffixes: J cost units that go.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from structprune.allocation.allocator import Allocator
from structprune.allocation.budget import AllocationOptions, BlockBudget
from structprune.allocation.menu import Budget, Choice, Slot, filled, kept_units, make_menu
from structprune.errors import InputError

# More states than that are brought to larger cost units, so that the table stays small: int16 x states x slots.
_MOST_STATES = 2**17
# Additions of one state to one variant: a few seconds.
_MOST_STEPS = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """The useful variants of one slot: position in the slot, cost units that go, price."""

    places: list[int]
    gone: list[int]
    prices: list[float]


def dynamic_programming(slots: Sequence[Slot], budget: Budget) -> Choice:
    """Find the choice of least price whose one cost is at most the limit; of several the one that removes least.

    Where the limit has more cost units than the table may have states, costs are rounded, against the choice, to units
    that are as large as they must be, and what the rounding removed without need is taken back: the budget is met then
    too, and the price is that of a limit lower by at most a unit for each slot. Raises InputError if no choice meets
    the budget.
    """
    (at_most,) = budget.at_most
    largest = sum(slot.variants[0].cost[0] for slot in slots)
    target = largest - at_most
    if target > largest - sum(slot.variants[-1].cost[0] for slot in slots):
        raise InputError("no choice of widths meets the limit", got=str(at_most), do="raise the limit")
    cheapest = tuple(slot.undominated[0] for slot in slots)
    if budget.met(slots, cheapest):
        return cheapest
    unit = math.gcd(*(slot.variants[0].cost[0] - variant.cost[0] for slot in slots for variant in slot.variants))
    items = [_item(slot, unit) for slot in slots]
    coarse = max(1, -(-target // unit // _MOST_STATES))
    while len(slots) * coarse < target // unit and _num_steps(items, -(-target // (unit * coarse))) > _MOST_STEPS:
        coarse *= 2
        items = [_item(slot, unit * coarse) for slot in slots]
    if coarse > 1:
        items = [_item(slot, unit * coarse) for slot in slots]
    return filled(slots, _solve(items, -(-target // (unit * coarse))), budget)


def _item(slot: Slot, unit: int) -> _Item:
    """Count in units, rounded down; of variants that are the same then only the cheapest is left."""
    cheapest: dict[int, int] = {}
    for place in slot.undominated:
        # Ascending prices: the first one of each count is its cheapest.
        cheapest.setdefault((slot.variants[0].cost[0] - slot.variants[place].cost[0]) // unit, place)
    return _Item(
        places=list(cheapest.values()),
        gone=list(cheapest),
        prices=[slot.variants[place].price for place in cheapest.values()],
    )


def _num_steps(items: Sequence[_Item], target: int) -> int:
    return target * sum(len(item.gone) for item in items)


def _solve(items: Sequence[_Item], target: int) -> Choice:
    """Choose a variant of each item so that at least `target` units go, at the least price, then by the fewest units.

    With prices that ascend no choice is better that could keep a step more, so the units that go beyond the target are
    fewer than those of the largest step.
    """
    steps = [b - a for item in items for a, b in itertools.pairwise(item.gone)]
    num_states = target + max([1, *steps, *(item.gone[0] for item in items)])
    price_J = np.full(num_states, np.inf)
    price_J[0] = 0.0
    taken = np.zeros((len(items), num_states), dtype=np.int16 if max(len(i.gone) for i in items) < 2**15 else np.int32)
    for number, item in enumerate(items):
        best_J = np.full(num_states, np.inf)
        for variant, (gone, price) in enumerate(zip(item.gone, item.prices, strict=True)):
            if gone >= num_states:
                break
            candidate_J = price_J[: num_states - gone] + price
            better_J = candidate_J < best_J[gone:]
            np.copyto(best_J[gone:], candidate_J, where=better_J)
            taken[number, gone:][better_J] = variant
        price_J = best_J
    state = target + int(np.argmin(price_J[target:]))
    assert np.isfinite(price_J[state])
    return _read_back(items, taken, state)


def _read_back(items: Sequence[_Item], taken: NDArray[np.signedinteger], state: int) -> Choice:
    """Follow the variants that were taken, from the last slot to the first."""
    chosen: list[int] = []
    for number in range(len(items) - 1, -1, -1):
        variant = int(taken[number, state])
        chosen.append(items[number].places[variant])
        state -= items[number].gone[variant]
    assert state == 0
    return tuple(chosen[::-1])


def allocate_exactly(budgets: Sequence[BlockBudget], options: AllocationOptions) -> list[int]:
    """Return the units to keep whose removals have the least total loss of all that meet the limit.

    Raises InputError if the limit cannot be met within the groups' bounds.
    """
    slots, budget = make_menu(budgets, options)
    return kept_units(slots, dynamic_programming(slots, budget))


DP = Allocator(allocate=allocate_exactly, compares="loss", weighs_widths=True)
