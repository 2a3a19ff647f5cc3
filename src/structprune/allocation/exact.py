"""The choice of least predicted loss within a budget, however many limits it has."""

from __future__ import annotations

from collections.abc import Sequence

from structprune.allocation.knapsack import dynamic_programming
from structprune.allocation.menu import Budget, Choice, Slot
from structprune.allocation.mixed_integer import mixed_integer


def least_loss(slots: Sequence[Slot], budget: Budget) -> Choice:
    """Find the choice of least predicted loss: by dynamic programming, by mixed-integer programming for several limits.

    Raises InputError if no choice meets the budget.
    """
    solve = dynamic_programming if len(budget.at_most) == 1 else mixed_integer
    return solve(slots, budget)
