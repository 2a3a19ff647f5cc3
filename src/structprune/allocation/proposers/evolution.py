"""Evolution of one choice by swaps, the best of parent and children being the next parent.

A swap takes units from one slot and gives what they weigh to another, so every child weighs what its parent does.
EvoPress (arXiv 2410.14649), Tyr-the-Pruner (2503.09657) and DarwinLM (2502.07780) differ in how many swaps a child has,
how far one moves, and whether it stays within attention or MLP. What is left out of them: DarwinLM trains its
candidates for a moment before it compares them, here their consumers are solved; Tyr prunes new variants around the
best choice four times, here any width has its variant, so that only the step is halved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from structprune.allocation.menu import Budget, Choice, Slot
from structprune.allocation.proposers.levels import adapted, stepped
from structprune.allocation.proposers.proposer import Measured, Rung, Search, SearchOptions, winner

_TRIES = 50
"""Mutations that are tried for each child that is wanted: some do not fit, or give a choice that was there before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """How a child differs from its parent."""

    most_swaps: int
    """The number of swaps is the smaller of two draws from 1 to this."""
    steps: tuple[float, ...]
    """Share of a slot's units that a swap takes, for equal parts of the search."""
    within_kind: bool = False
    """Whether attention gives to attention only, and an MLP to MLPs."""
    of_start: bool = False
    """Whether children are mutations of the choice that the search began with, whatever was found since."""


class Evolution:
    """The search. `best` is the parent."""

    def __init__(
        self, slots: Sequence[Slot], budget: Budget, start: Choice, options: SearchOptions, *, mutation: Mutation
    ) -> None:
        self._slots, self._budget, self._options, self._mutation = slots, budget, options, mutation
        self._random = np.random.default_rng(options.seed)
        self._start = self._parent = start
        self._generation, self._seen = 0, {start}

    def ask(self) -> Sequence[Choice]:
        """Return new children of the parent; fewer than wanted, or none, where there are no more."""
        children: list[Choice] = []
        if self._generation == self._options.generations:
            return children
        for _ in range(_TRIES * self._options.children):
            if len(children) == self._options.children:
                break
            child = self._mutated(self._start if self._mutation.of_start else self._parent)
            if child is not None and child not in self._seen:
                self._seen.add(child)
                children.append(child)
        return children

    def tell(self, rounds: Sequence[Sequence[Measured]]) -> None:
        """Take the best of the last round as the next parent."""
        self._parent = winner(rounds)
        self._generation += 1

    def best(self) -> Choice:
        """Return the parent."""
        return self._parent

    def _mutated(self, choice: Choice) -> Choice | None:
        part = self._generation * len(self._mutation.steps) // self._options.generations
        for _ in range(int(min(self._random.integers(1, self._mutation.most_swaps + 1, size=2)))):
            swapped = self._swapped(choice, self._mutation.steps[part])
            if swapped is None:
                return None
            choice = swapped
        return choice

    def _swapped(self, choice: Choice, step: float) -> Choice | None:
        """Move the slot of larger units by a step, and let the other one weigh what makes up for it."""
        first = int(self._random.integers(len(self._slots)))
        kind = self._slots[first].kind
        others = [
            number
            for number, slot in enumerate(self._slots)
            if number != first and (slot.kind == kind or not self._mutation.within_kind)
        ]
        if not others:
            return None
        second = others[int(self._random.integers(len(others)))]
        coarse, fine = sorted((first, second), key=lambda number: -_unit_cost(self._slots[number]))
        towards = -1 if self._random.integers(2) else 1
        place = stepped(self._slots[coarse], choice[coarse], towards * step)
        if place is None:
            return None
        return adapted(self._slots, (*choice[:coarse], place, *choice[coarse + 1 :]), fine, self._budget)


def _unit_cost(slot: Slot) -> float:
    """Return what a unit adds to the first sum that is limited."""
    largest, smallest = slot.variants[0], slot.variants[-1]
    return (largest.cost[0] - smallest.cost[0]) / max(1, largest.keep - smallest.keep)


EVOPRESS = Search(
    title="EvoPress: evolution by level switches",
    paper="arXiv 2410.14649",
    provenance="read in public code",
    propose=partial(Evolution, mutation=Mutation(most_swaps=3, steps=(0.125,))),
    generations=12,
    children=16,
    rungs=(Rung(windows=2), Rung(windows=8, choices=4)),
)
TYR = Search(
    title="Tyr-the-Pruner: evolution from coarse to fine",
    paper="arXiv 2503.09657",
    provenance="read in public code",
    propose=partial(
        Evolution, mutation=Mutation(most_swaps=4, steps=(0.125, 0.0625, 0.03125, 0.015625), within_kind=True)
    ),
    generations=12,
    children=16,
    rungs=(Rung(windows=2), Rung(windows=4, choices=4), Rung(windows=8, choices=2)),
)
DARWINLM = Search(
    title="DarwinLM: evolution of structured sparsity",
    paper="arXiv 2502.07780",
    provenance="read in public code",
    propose=partial(Evolution, mutation=Mutation(most_swaps=3, steps=(0.1,), within_kind=True)),
    generations=12,
    children=16,
    rungs=(Rung(windows=1), Rung(windows=2, choices=8), Rung(windows=4, choices=4), Rung(windows=8, choices=2)),
)
RANDOM = Search(
    title="Best of random changes: what any search has to beat",
    paper="arXiv 2310.13183",
    provenance="baseline",
    propose=partial(Evolution, mutation=Mutation(most_swaps=4, steps=(0.125,), of_start=True)),
    generations=12,
    children=16,
    rungs=(Rung(windows=2), Rung(windows=8, choices=4)),
)
