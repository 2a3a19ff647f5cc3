"""SPDY (arXiv 2201.13096): exact choices for predicted losses whose scale is searched.

Predicted losses may be too low for some slots and too high for others. Each proposal scales them, a factor for each
slot, and takes the exact choice for what results; so every proposal meets the budget, and what is searched is how far
the predictions are to be believed. As in the public code the first factors are random; then a share of the factors of
the best proposal, which shrinks, is drawn again. Different here: factors lie around 1, where the predictions are as
they were measured, and not evenly between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from structprune.allocation.exact import least_loss
from structprune.allocation.menu import Budget, Choice, Slot, filled
from structprune.allocation.proposers.levels import thinned
from structprune.allocation.proposers.proposer import Measured, Rung, Search, SearchOptions, winner

_SPACING = 1 / 32
"""Share of the units between the widths that are chosen from."""
_SPREAD = 0.5
"""Standard deviation of a factor's logarithm."""
_CHANGED = 0.1
"""Share of the factors that is drawn again at first."""
_TRIES = 20


class Spdy:
    """The search; `best` is the choice of the factors that lost least."""

    def __init__(self, slots: Sequence[Slot], budget: Budget, start: Choice, options: SearchOptions) -> None:
        self._slots, self._budget, self._options = slots, budget, options
        self._thinned, self._places = thinned(slots, _SPACING)
        self._random = np.random.default_rng(options.seed)
        self._best, self._factors = start, np.zeros(len(slots))
        self._asked: dict[Choice, NDArray[np.float64]] = {start: self._factors}
        self._generation = 0

    def ask(self) -> Sequence[Choice]:
        """Return the exact choices for new factors; fewer than wanted where they agree with earlier ones."""
        new: list[Choice] = []
        if self._generation == self._options.generations:
            return new
        for _ in range(_TRIES * self._options.children):
            if len(new) == self._options.children:
                break
            factors = self._drawn()
            choice = self._exact(factors)
            if choice not in self._asked:
                self._asked[choice] = factors
                new.append(choice)
        return new

    def tell(self, rounds: Sequence[Sequence[Measured]]) -> None:
        """Go on from the factors of the best of the last round."""
        self._best = winner(rounds)
        self._factors = self._asked[self._best]
        self._generation += 1

    def best(self) -> Choice:
        """Return the best choice by now."""
        return self._best

    def _drawn(self) -> NDArray[np.float64]:
        fresh = self._random.normal(0, _SPREAD, len(self._slots))
        if self._generation == 0:
            return fresh
        left = 1 - self._generation / self._options.generations
        count = max(1, round(_CHANGED * len(self._slots) * left))
        changed = self._random.permutation(len(self._slots))[:count]
        factors = self._factors.copy()
        factors[changed] = fresh[changed]
        return factors

    def _exact(self, factors: NDArray[np.float64]) -> Choice:
        scaled = [slot.scaled(float(factor)) for slot, factor in zip(self._thinned, np.exp(factors), strict=True)]
        chosen = least_loss(scaled, self._budget)
        choice = tuple(places[place] for places, place in zip(self._places, chosen, strict=True))
        return filled(self._slots, choice, self._budget)


SPDY = Search(
    title="SPDY: exact choices for rescaled losses",
    paper="arXiv 2201.13096",
    provenance="read in public code",
    propose=Spdy,
    generations=8,
    children=12,
    rungs=(Rung(windows=2), Rung(windows=8, choices=4)),
)
