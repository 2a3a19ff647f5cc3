"""What a search over widths is made of: who proposes choices, what it hears of them, how many are measured how well.

A proposer never sees a model. It is asked for choices, which are measured together on the same windows of text, and is
told what they lost. It depends on its seed and on what it is told alone, so a process that goes on with a search asks
again and tells what was measured before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from structprune.allocation.menu import Budget, Choice, Slot
from structprune.kinds import Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One choice and what it lost."""

    choice: Choice
    losses: tuple[float, ...]
    """KL divergence from the dense model of each window, in nats per token; of all choices of a round the same windows.
    Never to be compared with those of another round: windows differ more than choices do."""
    figure: float | None = None
    """What they come to where that is not their mean, such as the mean of the text that fares worst."""

    @property
    def loss(self) -> float:
        """What the choice is judged by: less is better."""
        return sum(self.losses) / len(self.losses) if self.figure is None else self.figure


def winner(rounds: Sequence[Sequence[Measured]]) -> Choice:
    """Return the choice that lost least in the last round; of equal ones the first."""
    return min(rounds[-1], key=lambda measured: measured.loss).choice


class Proposer(Protocol):
    """A search over the widths of all slots."""

    def ask(self) -> Sequence[Choice]:
        """Return different choices to be measured together, each within the budget; none: the search is over."""
        ...

    def tell(self, rounds: Sequence[Sequence[Measured]]) -> None:
        """Take in the losses of the choices that were asked for: first of all, then of those that were measured again.

        The last round has `best()` among them, measured on the same windows as the others.
        """
        ...

    def best(self) -> Choice:
        """Return what the search would end with by now; before the first `tell`, what it starts from."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One round of measurements: the best of the round before go on to it."""

    windows: int
    """Windows of text that each choice is measured on, drawn anew for every round."""
    choices: int | None = None
    """The most choices that are measured; None: all that were asked for. The best one so far is one more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Settings that proposers share."""

    generations: int
    """How often choices are asked for at most."""
    children: int
    """Choices that are asked for at a time."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """An entry of the table of searches."""

    title: str
    paper: str
    """Where it is from: `arXiv 2410.14649`."""
    provenance: Provenance
    propose: Callable[[Sequence[Slot], Budget, Choice, SearchOptions], Proposer]
    """(all widths with predicted losses, what all may add together, first choice, settings) -> search."""
    generations: int
    children: int
    rungs: tuple[Rung, ...]
    even: bool = False
    """Whether all sublayers of a kind keep one width, so that a stock config describes the result."""

    def options(self, generations: int | None, children: int | None, seed: int) -> SearchOptions:
        """Return the settings of a run: what is not asked for is as here."""
        asked = {"generations": generations, "children": children}
        given = {name: value for name, value in asked.items() if value is not None}
        return dataclasses.replace(
            SearchOptions(generations=self.generations, children=self.children, seed=seed), **given
        )
