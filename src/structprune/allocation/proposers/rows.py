"""Searches that list all of their choices at once: one generation, and the best of it is the result.

`grid` is the search of Minitron (arXiv 2407.14679): every block of one shape, so that a stock config describes the
result; here the predicted loss ranks the shapes before any is measured. `progression` is the one-number baseline of
arXiv 2502.14770: kept shares that rise or fall evenly from the first block to the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structprune.allocation.menu import Budget, Choice, Slot, total_price
from structprune.allocation.proposers.levels import at_budget, kept_shares, place_of, shifted
from structprune.allocation.proposers.proposer import Measured, Rung, Search, SearchOptions, winner
from structprune.kinds import UnitKind

_STEEPEST = 0.8
"""Difference between the shares that the last and the first block lose, of the steepest progression."""


class Listed:
    """A search that is one list of choices."""

    def __init__(self, choices: Sequence[Choice], start: Choice) -> None:
        self._left, self._best = list(dict.fromkeys(choices)), start

    def ask(self) -> Sequence[Choice]:
        """Return all choices, once."""
        asked, self._left = self._left, []
        return asked

    def tell(self, rounds: Sequence[Sequence[Measured]]) -> None:
        """Keep the best of the last round."""
        self._best = winner(rounds)

    def best(self) -> Choice:
        """Return the best choice that was measured, or the first one."""
        return self._best


def grid(slots: Sequence[Slot], budget: Budget, start: Choice, options: SearchOptions) -> Listed:
    """List the shapes that all blocks share and the budget allows, those of least predicted loss first.

    Of each kind all slots keep one share. For every width of one kind the other one is as wide as it may be.
    """
    kinds: list[UnitKind] = sorted({slot.kind for slot in slots})
    rows = {kind: _shared_widths([slot for slot in slots if slot.kind == kind]) for kind in kinds}

    def choose(share_of: dict[UnitKind, float]) -> Choice:
        return tuple(place_of(slot, share_of[slot.kind]) for slot in slots)

    shapes: list[Choice] = []
    first, *others = kinds
    last = others[0] if others else first
    for share in rows[first] if others else [1.0]:
        shape = at_budget(
            lambda number, share=share: choose({first: share, last: rows[last][number]}),
            len(rows[last]) - 1,
            slots,
            budget,
        )
        if shape is not None:
            shapes.append(shape)
    shapes = sorted(dict.fromkeys(shapes), key=lambda shape: total_price(slots, shape))[: options.children]
    return Listed(shapes, start if _is_even(slots, start) or not shapes else shapes[0])


def _shared_widths(slots: Sequence[Slot]) -> list[float]:
    """List the shares that every slot can keep, but for those that keep everything; from the largest."""
    rows = [{variant.keep / slot.variants[0].keep for variant in slot.variants} for slot in slots]
    free = [row for row in rows if len(row) > 1] or rows
    return sorted(set.intersection(*free), reverse=True)


def _is_even(slots: Sequence[Slot], choice: Choice) -> bool:
    shares = kept_shares(slots, choice)
    free = {(slot.kind, share) for slot, share in zip(slots, shares, strict=True) if len(slot.variants) > 1}
    return len(free) == len({kind for kind, _ in free})


def progression(slots: Sequence[Slot], budget: Budget, start: Choice, options: SearchOptions) -> Listed:
    """List choices whose kept shares change evenly over the depth, from falling to rising."""
    last = max(1, *(slot.block for slot in slots))
    depth = np.array([slot.block / last - 0.5 for slot in slots])
    slopes = np.linspace(-_STEEPEST, _STEEPEST, options.children)
    choices = (shifted(slots, 0.5 + slope * depth, budget) for slope in slopes)
    return Listed([choice for choice in choices if choice is not None], start)


GRID = Search(
    title="Minitron: one shape for all blocks",
    paper="arXiv 2407.14679",
    provenance="read in public code",
    propose=grid,
    generations=1,
    children=10,
    rungs=(Rung(windows=8), Rung(windows=16, choices=3)),
    even=True,
)
PROGRESSION = Search(
    title="Arithmetic progression over depth",
    paper="arXiv 2502.14770",
    provenance="baseline",
    propose=progression,
    generations=1,
    children=9,
    rungs=(Rung(windows=8), Rung(windows=16, choices=3)),
)
