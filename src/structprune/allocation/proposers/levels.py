"""Moves between widths that stay within a budget.

Slots list every width that a group may have. A search moves along a part of them, its levels: near equal shares of a
group's units, so that a step is as large for a narrow group as for a wide one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structprune.allocation.menu import Budget, Choice, Slot, filled, total_cost


def levels_of(slot: Slot, spacing: float, center: int = 0) -> list[int]:
    """Return the positions of a slot's variants that lie about `spacing` of its units apart, ascending.

    The variant at `center` is one of them, and so are the largest and the smallest.
    """
    keeps = np.array([variant.keep for variant in slot.variants])
    step = max(1.0, spacing * keeps[0])
    first = keeps[center]
    wanted = np.arange(first % step, keeps[0] + 1, step)
    nearest = {int(np.abs(keeps - keep).argmin()) for keep in wanted}
    return sorted(nearest | {center, 0, len(keeps) - 1})


def refilled(slots: Sequence[Slot], choice: Choice, budget: Budget) -> Choice | None:
    """Bring a choice to the budget by the steps of least predicted loss; None where no width is small enough.

    While a sum is too large the slot whose next smaller width costs the least predicted loss for what it saves gives
    it; then what the budget leaves is taken back, the dearest step first.
    """
    chosen = list(choice)
    while not budget.met(slots, tuple(chosen)):
        totals = total_cost(slots, tuple(chosen))
        over = [total > most for total, most in zip(totals, budget.at_most, strict=True)]
        least: tuple[float, int] | None = None
        for number, slot in enumerate(slots):
            if chosen[number] + 1 == len(slot.variants):
                continue
            now, after = slot.variants[chosen[number]], slot.variants[chosen[number] + 1]
            saved = sum(a - b for a, b, counts in zip(now.cost, after.cost, over, strict=True) if counts)
            price = (after.price - now.price) / saved if saved > 0 else np.inf
            if saved > 0 and (least is None or price < least[0]):
                least = price, number
        if least is None:
            return None
        chosen[least[1]] += 1
    return filled(slots, tuple(chosen), budget)
