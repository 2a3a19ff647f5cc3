"""Moves between widths that stay within a budget.

Slots list every width that a group may have, so a search says how far it moves: a share of the group's units, the same
for a narrow group and for a wide one. What a move frees, another slot takes to the last unit.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from structprune.allocation.menu import Budget, Choice, Slot


def kept_shares(slots: Sequence[Slot], choice: Choice) -> NDArray[np.float64]:
    """Return the share of its units that each slot keeps, of the most that it may keep."""
    pairs = zip(slots, choice, strict=True)
    return np.array([slot.variants[place].keep / slot.variants[0].keep for slot, place in pairs])


def place_of(slot: Slot, share: float) -> int:
    """Return the position of the largest variant that keeps no more than a share of the units; else the smallest."""
    # Shares come from divisions by the same width: the tolerance gives the width back.
    most = share * slot.variants[0].keep + 1e-9
    place = bisect.bisect_left(slot.variants, -most, key=lambda variant: -variant.keep)
    return min(place, len(slot.variants) - 1)


def stepped(slot: Slot, place: int, share: float) -> int | None:
    """Return the position about `share` of the units further down, or up where it is negative; None at the end."""
    keep = slot.variants[place].keep - share * slot.variants[0].keep
    towards = 1 if share > 0 else -1
    if not 0 <= place + towards < len(slot.variants):
        return None
    distances = [abs(variant.keep - keep) for variant in slot.variants]
    nearest = min(range(len(distances)), key=distances.__getitem__)
    return nearest if (nearest - place) * towards > 0 else place + towards


def at_budget(choose: Callable[[int], Choice], last: int, slots: Sequence[Slot], budget: Budget) -> Choice | None:
    """Return the first choice of a row, each smaller than the one before, that meets the budget; None if none does."""
    number = bisect.bisect_left(range(last + 1), True, key=lambda number: budget.met(slots, choose(number)))
    return None if number > last else choose(number)


def adapted(slots: Sequence[Slot], choice: Choice, number: int, budget: Budget) -> Choice | None:
    """Give one slot the largest width that the others leave; None where they leave too little."""

    def with_place(place: int) -> Choice:
        return (*choice[:number], place, *choice[number + 1 :])

    return at_budget(with_place, len(slots[number].variants) - 1, slots, budget)


_SHIFTS = 4000
"""Offsets between keeping everything and nothing: a hundredth of a percent of the units is two of them."""


def shifted(slots: Sequence[Slot], shares: Sequence[float] | NDArray[np.float64], budget: Budget) -> Choice | None:
    """Lower or raise all shares by one number until the budget is met; None where no width is small enough.

    Then the slots whose widths were rounded down take what is left, the earlier ones first.
    """

    def lowered(number: int) -> Choice:
        offset = 1 - 2 * number / _SHIFTS
        return tuple(place_of(slot, min(1.0, share + offset)) for slot, share in zip(slots, shares, strict=True))

    found = at_budget(lowered, _SHIFTS, slots, budget)
    if found is None:
        return None
    for number, place in enumerate(found):
        if place > 0:
            raised = (*found[:number], place - 1, *found[number + 1 :])
            found = raised if budget.met(slots, raised) else found
    return found


def thinned(slots: Sequence[Slot], spacing: float) -> tuple[list[Slot], list[list[int]]]:
    """Leave the widths that lie at least a share of the units apart, and the last; also return their positions."""
    result: list[Slot] = []
    places: list[list[int]] = []
    for slot in slots:
        chosen = [0]
        while (after := stepped(slot, chosen[-1], spacing)) is not None:
            chosen.append(after)
        places.append(chosen)
        variants = tuple(slot.variants[place] for place in chosen)
        result.append(Slot(block=slot.block, kind=slot.kind, variants=variants))
    return result, places
