"""Evolution of one choice of widths by swaps: EvoPress (arXiv 2410.14649)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structprune.allocation.menu import Budget, Choice, Slot
from structprune.allocation.proposers.levels import levels_of, refilled
from structprune.allocation.proposers.proposer import Measured, Rung, Search, SearchOptions

_TRIES = 100
"""Mutations that are tried for each child that is asked for: many give a choice that was there before."""
_SPACING = 0.125
"""Share of a group's units between two levels."""


class Evolution:
    """The best of the children and their parent is the next parent; a child is the parent with some units moved."""

    def __init__(self, slots: Sequence[Slot], budget: Budget, start: Choice, options: SearchOptions) -> None:
        self._slots, self._budget, self._options = slots, budget, options
        self._random = np.random.default_rng(options.seed)
        self._parent, self._generation, self._seen = start, 0, {start}

    def ask(self) -> Sequence[Choice]:
        """Return the parent's children; fewer than are asked for where the widths allow no more."""
        if self._generation == self._options.generations:
            return []
        children: list[Choice] = []
        for _ in range(_TRIES * self._options.children):
            if len(children) == self._options.children:
                break
            child = self._mutated()
            if child is not None and child not in self._seen:
                self._seen.add(child)
                children.append(child)
        return children

    def tell(self, rounds: Sequence[Sequence[Measured]]) -> None:
        """Take the best of the last round, the parent among them, as the next parent."""
        self._parent = min(rounds[-1], key=lambda measured: measured.loss).choice
        self._generation += 1

    def best(self) -> Choice:
        """Return the parent."""
        return self._parent

    def _mutated(self) -> Choice | None:
        """Raise some slots by a level each and lower as many others; then bring the whole to the budget."""
        swaps = int(min(self._random.integers(1, 4, size=2)))
        chosen = list(self._parent)
        picked = self._random.permutation(len(self._slots))[: 2 * swaps]
        for order, number in enumerate(picked):
            levels = levels_of(self._slots[number], _SPACING, chosen[number])
            place = levels.index(chosen[number]) + (1 if order % 2 else -1)
            chosen[number] = levels[min(max(place, 0), len(levels) - 1)]
        return refilled(self._slots, tuple(chosen), self._budget)


EVOPRESS = Search(
    title="EvoPress: evolution by level switches",
    paper="arXiv 2410.14649",
    provenance="read in public code",
    propose=Evolution,
    generations=12,
    children=16,
    rungs=(Rung(windows=2), Rung(windows=8, choices=4)),
)
