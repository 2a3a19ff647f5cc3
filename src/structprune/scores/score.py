"""What a score is, and a selector: the function, what it reads of a problem, and what it holds beside it."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

from torch import Tensor

from structprune.types import LayerProblem, Statistic


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Matrices in float64 that are held at most beside the problem."""

    grams: int = 0
    """Number of those as large as the Gram."""
    consumers: int = 1
    """Number of those as large as the consumer's weight: one is two copies in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A number for each unit of one block's problem, (units,); those with the lowest go first."""

    score: Callable[[LayerProblem], Tensor]
    reads: Set[Statistic]
    """What of the problem has to be measured for it; the weights are always there."""
    workspace: Workspace = Workspace()


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """A choice of the units of one block's problem that stay, all together: (problem, number to keep) -> mask (units,).

    Greedy removal, exchanges and penalties count on what the units that stay can make up for.
    """

    keep: Callable[[LayerProblem, int], Tensor]
    reads: Set[Statistic]
    """What of the problem has to be measured for it; the weights are always there."""
    workspace: Workspace
    keeps_partitions: bool = True
    """Whether it keeps as many units in each partition: one per KV head where units are value channels."""
