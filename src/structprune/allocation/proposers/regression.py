"""Exact choices for predicted losses whose scales are fitted to everything that was measured.

Evolution and SPDY keep the best choice and forget what the others lost. Here each measurement counts: the loss of a
choice is taken as a sum of the slots' predicted losses, each times a factor of its own, and the factors are fitted to
all measurements by least squares, drawn towards one common factor. What is searched are therefore the numbers that a
choice depends on, one for each slot, and a choice that changes all slots says something of all of them.

Our own construction. Proposals are the exact choices, near the best choice that was measured, for factors that are
drawn from what is believed of them (Thompson sampling), and the one for what they are on average. Far from that choice
losses are no sums, and where a group has few units one of them is a long way: few such groups move at a time.

What is predicted wrongly most of all is a whole kind: single sublayers are measured in a dense model, where the others
make up for an attention that is gone sooner than for an MLP. The first choices therefore have the losses of one kind
all times one number, however far that is from the start, and a kind has a factor of its own that its slots share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from structprune.allocation.exact import least_loss
from structprune.allocation.menu import Budget, Choice, Slot, filled
from structprune.allocation.proposers.levels import thinned
from structprune.allocation.proposers.proposer import Measured, Rung, Search, SearchOptions, winner

_SPACING = 1 / 32
"""Share of the units between the widths that are chosen from."""
_REACH = 1 / 10
"""Share of a slot's units by which a choice differs from the best one so far."""
_COARSE = 0.15
"""Share of the slots where that is no unit, that may differ by one."""
_SPREAD = 0.3
"""Standard deviation of a factor before anything was measured, of the common factor."""
_KIND_SPREAD = 0.5
"""Standard deviation of what the factors of a kind share, of the common factor."""
_KIND_FACTORS = (0.5, 0.7, 1.25, 1.5, 2.0, 2.8)
"""What the losses of one kind are multiplied by for the first choices."""
_SPREADS = (0.1, 0.2, 0.4, 0.8)
"""Standard deviations that are tried where something was."""
_NOISES = tuple(2.0**power for power in range(-16, 1))
"""Variances of a measurement that are tried, of what the losses of a round vary by."""
_LOWEST, _HIGHEST = 0.1, 10.0
"""Bounds of a factor, of the common one."""
_TRIES = 20


@dataclass(frozen=True, slots=True)
class Belief:
    """What is believed of the factors, as shares of a common one: a normal distribution."""

    mean: NDArray[np.float64]
    root: NDArray[np.float64]
    """A square root of their covariance: mean + root @ z for normal z is a draw."""

    def drawn(self, random: np.random.Generator) -> NDArray[np.float64]:
        """Draw factors."""
        return np.clip(self.mean + self.root @ random.normal(size=len(self.mean)), _LOWEST, _HIGHEST)


def unmeasured(num_slots: int) -> Belief:
    """Return what is believed before anything was measured."""
    return Belief(np.ones(num_slots), _SPREAD * np.eye(num_slots))


def shared_prior(slots: Sequence[Slot]) -> NDArray[np.float64]:
    """Return the covariance of what slots' factors share, (slots, slots): all one number, those of a kind another."""
    kinds = np.array([slot.kind for slot in slots])
    return 1.0 + _KIND_SPREAD**2 * (kinds[:, None] == kinds[None, :])


def fitted(prices: NDArray[np.float64], losses: NDArray[np.float64], common: NDArray[np.float64]) -> Belief:
    """Fit factors to measurements: `prices` (measurements, slots) are predicted losses, `losses` what was measured.

    Both are differences from the mean of their round, in units in which the common factor is about 1. Bayesian linear
    regression: factors are normal around what they share, which is normal around 1 (`common`, its covariance), and how
    far they vary, and the measurements with them, is what makes the measurements likeliest.
    """
    num_measured, num_slots = prices.shape
    alike = prices @ common @ prices.T
    apart = prices @ prices.T
    rest = losses - prices.sum(axis=1)
    size = float(losses @ losses) / num_measured
    best: tuple[float, float, NDArray[np.float64]] | None = None
    for spread in _SPREADS:
        values, vectors = np.linalg.eigh(alike + spread**2 * apart)
        turned = (vectors.T @ rest) ** 2
        for noise in _NOISES:
            variances = np.maximum(values, 0) + noise * size
            unlikely = float(np.sum(turned / variances + np.log(variances)))
            if best is None or unlikely < best[0]:
                best = unlikely, spread, (vectors / variances) @ vectors.T
    assert best is not None
    _, spread, inverse = best
    prior = spread**2 * np.eye(num_slots) + common
    shared = prior @ prices.T
    mean = 1 + shared @ (inverse @ rest)
    values, vectors = np.linalg.eigh(prior - shared @ inverse @ shared.T)
    root = vectors * np.sqrt(np.maximum(values, 0))
    # All factors times one number choose the same widths.
    level = max(float(np.median(mean)), _LOWEST)
    return Belief(np.clip(mean / level, _LOWEST, _HIGHEST), root / level)


class Regression:
    """The search; `best` is the choice that lost least in the last round."""

    def __init__(self, slots: Sequence[Slot], budget: Budget, start: Choice, options: SearchOptions) -> None:
        self._slots, self._budget, self._options = slots, budget, options
        self._places = thinned(slots, _SPACING)[1]
        self._random = np.random.default_rng(options.seed)
        self._best, self._seen = start, {start}
        self._far: set[Choice] = set()
        """Choices that are so far from the others that losses are no sums there: the fit leaves them out."""
        self._generation = 0
        self._belief = unmeasured(len(slots))
        self._prices: list[NDArray[np.float64]] = []
        self._losses: list[NDArray[np.float64]] = []

    def ask(self) -> Sequence[Choice]:
        """Return exact choices: for what is believed on average, once something was measured, and for draws of that."""
        new: list[Choice] = []
        if self._generation == self._options.generations:
            return new
        if self._generation == 0 and (far := self._by_kind()):
            return far
        for number in range(_TRIES * self._options.children):
            if len(new) == self._options.children:
                break
            average = number == 0 and bool(self._losses)
            choice = self._exact(self._belief.mean if average else self._belief.drawn(self._random), all_free=average)
            if choice not in self._seen:
                self._seen.add(choice)
                new.append(choice)
        return new

    def tell(self, rounds: Sequence[Sequence[Measured]]) -> None:
        """Fit the factors to all that was measured so far, and go on from the best of the last round."""
        self._best, self._generation = winner(rounds), self._generation + 1
        found = [one for one in rounds[-1] if one.choice not in self._far]
        if len(found) < 2:
            return
        prices = np.array([self._priced(one.choice) for one in found])
        losses = np.array([one.loss for one in found])
        # A loss is some times what was predicted, which is the common factor at first.
        prices *= losses.mean() / max(float(prices.sum(axis=1).mean()), 1e-300)
        # Windows differ more than choices do, so that only differences within a round count.
        self._prices.append(prices - prices.mean(axis=0))
        self._losses.append(losses - losses.mean())
        self._belief = fitted(np.concatenate(self._prices), np.concatenate(self._losses), shared_prior(self._slots))

    def best(self) -> Choice:
        """Return the best choice by now."""
        return self._best

    def _priced(self, choice: Choice) -> list[float]:
        return [slot.variants[place].price for slot, place in zip(self._slots, choice, strict=True)]

    def _by_kind(self) -> list[Choice]:
        """Return the exact choices for losses of one kind that are all times one number."""
        found: list[Choice] = []
        # Of two kinds, one times a number is the other one divided by it.
        for kind in sorted({slot.kind for slot in self._slots})[:-1]:
            for factor in _KIND_FACTORS:
                scaled = [slot.scaled(factor if slot.kind == kind else 1.0) for slot in self._slots]
                choice = least_loss(scaled, self._budget)
                if choice not in self._seen and len(found) < self._options.children:
                    self._seen.add(choice)
                    found.append(choice)
        self._far.update(found)
        return found

    def _exact(self, factors: NDArray[np.float64], *, all_free: bool) -> Choice:
        """Return the choice of least loss for these factors, near the best one so far."""
        near: list[list[int]] = []
        scaled: list[Slot] = []
        for slot, factor, places, place in zip(self._slots, factors, self._places, self._best, strict=True):
            keep, reach = slot.variants[place].keep, _REACH * slot.variants[0].keep
            if reach < 1:
                free = all_free or self._random.random() < _COARSE
                reach = 1.0 if free else 0.0
            chosen = [one for one in places if abs(slot.variants[one].keep - keep) <= reach]
            near.append(sorted({*chosen, place}))
            allowed = replace(slot, variants=tuple(slot.variants[one] for one in near[-1]))
            scaled.append(allowed.scaled(float(factor)))
        found = least_loss(scaled, self._budget)
        choice = tuple(places[place] for places, place in zip(near, found, strict=True))
        return filled(self._slots, choice, self._budget)


REGRESSION = Search(
    title="Exact choices for losses fitted to all measurements",
    paper="ours, after arXiv 2201.13096",
    provenance="derived",
    propose=Regression,
    generations=12,
    children=14,
    rungs=(Rung(windows=4),),
)
