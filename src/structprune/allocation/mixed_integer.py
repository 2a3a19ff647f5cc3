"""The choice of least predicted loss under several limits, by mixed-integer programming (HiGHS, through scipy).

One binary number for each variant of each slot, one of every slot's is 1; each limit is one linear row. This is how
Puzzle (arXiv 2411.19146) searches its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structprune.allocation.allocator import Allocator
from structprune.allocation.budget import AllocationOptions, BlockBudget
from structprune.allocation.menu import Budget, Choice, Slot, filled, kept_units, make_menu, total_cost
from structprune.errors import InputError

# Not a time limit: a run that goes on has to find the same widths.
_MOST_NODES = 20_000
# HiGHS calls a row met within 1e-6; its rows are scaled to 1. A choice that is over a limit after rounding is tried
# again under a limit that is lower by what it is over.
_MOST_TRIES = 8


def mixed_integer(slots: Sequence[Slot], budget: Budget) -> Choice:
    """Find the choice of least price that meets every limit; where it can keep more at no loss, it does.

    HiGHS proves the choice best unless it comes to its limit of nodes first. Raises InputError if no choice meets the
    budget.
    """
    if not budget.met(slots, tuple(len(slot.variants) - 1 for slot in slots)):
        raise InputError("no choice of widths meets every limit", got=_written(budget), do="raise a limit")
    limits = list(budget.at_most)
    for _ in range(_MOST_TRIES):
        choice = _solve(slots, limits)
        if choice is None:
            break
        over = [total - most for total, most in zip(total_cost(slots, choice), budget.at_most, strict=True)]
        if max(over) <= 0:
            return filled(slots, choice, budget)
        limits = [limit - max(0, more) for limit, more in zip(limits, over, strict=True)]
    raise InputError("no choice of widths was found that meets every limit", got=_written(budget), do="raise a limit")


def _written(budget: Budget) -> str:
    return ", ".join(f"{most:,}" for most in budget.at_most)


def _solve(slots: Sequence[Slot], limits: Sequence[int]) -> Choice | None:
    """Ask HiGHS once; None where it has found no choice."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    places = [slot.undominated for slot in slots]
    ends = np.cumsum([len(one) for one in places])
    starts = ends - [len(one) for one in places]
    variants = [slot.variants[place] for slot, chosen in zip(slots, places, strict=True) for place in chosen]
    prices = np.array([variant.price for variant in variants])
    one_of = np.zeros((len(slots), len(variants)))
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        one_of[row, start:end] = 1.0
    costs = np.array([variant.cost for variant in variants], dtype=np.float64).T
    scale = np.maximum(costs.max(axis=1, initial=1.0), 1.0)
    result: Any = milp(
        _scaled(prices),
        integrality=np.ones(len(variants)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_of, 1, 1),
            LinearConstraint(costs / scale[:, None], -np.inf, np.array(limits) / scale),
        ],
        options={"mip_rel_gap": 0.0, "node_limit": _MOST_NODES},
    )
    # A choice may be there although its proof is not.
    if result.x is None:
        return None
    return tuple(one[int(np.argmax(result.x[start:end]))] for one, start, end in zip(places, starts, ends, strict=True))


def _scaled(prices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bring prices to a size at which HiGHS's absolute gap of 1e-6 is none."""
    largest = float(np.abs(prices).max(initial=0.0))
    return prices * (1e6 / largest) if largest > 0 else prices


def allocate_within(budgets: Sequence[BlockBudget], options: AllocationOptions) -> list[int]:
    """Return the units to keep whose removals have the least total loss of all that meet every limit.

    Raises InputError if the limits cannot be met within the groups' bounds.
    """
    slots, budget = make_menu(budgets, options)
    return kept_units(slots, mixed_integer(slots, budget))


MILP = Allocator(
    allocate=allocate_within,
    compares="loss",
    holds_several=True,
    weighs_widths=True,
    packages=("scipy",),
    extra="structprune[milp]",
)
