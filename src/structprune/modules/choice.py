"""Which units leave: the least important of each family, of all families together, or of all that are isomorphic; or
those of all families whose loss the outputs feel least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.errors import InputError
from structprune.modules.costs import Counts
from structprune.modules.layout import ModuleLayout, UnitFamily
from structprune.modules.sensitivity import measured_per_cost
from structprune.registry import Registry
from structprune.tracing.replay import Example

_HALVINGS = 40
"""Bisection steps: a share is found to within 1e-12, finer than one unit of any model."""


Weigh = Callable[
    [ModuleLayout, Mapping[str, Tensor], Callable[[Counts], int], Sequence[Example], float], dict[str, Tensor]
]
"""(layout, scores by family, cost, examples, largest share that a family loses) -> scores by family."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Among which units the least important ones are looked for: families with equal keys are ranked together."""

    name: str
    key: Callable[[UnitFamily], object]
    weigh: Weigh | None = None
    """What becomes of the scores first; None: they are ranked as they are."""


LOCAL = Ranking(name="local", key=lambda family: family.name)
GLOBAL = Ranking(name="global", key=lambda family: None)
PATTERN = Ranking(name="pattern", key=lambda family: family.pattern)
MEASURED = Ranking(name="measured", key=lambda family: None, weigh=measured_per_cost)
RANKINGS: Registry[Ranking] = Registry(
    "ranking",
    Ranking,
    {name: f"structprune.modules.choice:{name.upper()}" for name in ("local", "global", "pattern", "measured")},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much of a family may leave."""

    max_share: float = 0.9
    """Largest share of a family's units that leaves; one unit stays in any case."""
    multiple_of: int = 1
    """What the number of units that stay is a multiple of, where the family has more than that."""


def choose(
    layout: ModuleLayout,
    scores: Mapping[str, Tensor],
    cost: Callable[[Counts], int],
    target: float,
    *,
    ranking: Ranking,
    limits: Limits,
) -> dict[str, list[int]]:
    """Choose the units that stay so that the cost is at most `target`, and removes as little as that takes.

    `scores` has the families that may lose units, (U,) each. Families that are ranked together lose the same
    share of all their units. Raises InputError with the least cost that is possible where the target is below it.
    """
    families = [family for family in layout.families if family.name in scores]

    def counted(keep: Mapping[str, Sequence[int]]) -> int:
        return cost({family.atom: len(keep[family.name]) for family in families})

    def at(share: float) -> dict[str, list[int]]:
        return _kept(families, scores, share, ranking, limits)

    if counted(at(0.0)) <= target:
        return at(0.0)
    least = at(1.0)
    if counted(least) > target:
        raise InputError(
            "so much cannot leave",
            where=type(layout.model).__name__,
            got=f"a budget of {target:.0f}",
            wanted=f"at least {counted(least)}, which is left where every family of {len(families)} keeps its least",
            do="ask for a lower sparsity, raise max_share, or let other families lose units",
        )
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if counted(at(middle)) <= target else (middle, high)
    return at(high)


def _kept(
    families: Sequence[UnitFamily], scores: Mapping[str, Tensor], share: float, ranking: Ranking, limits: Limits
) -> dict[str, list[int]]:
    together_by: dict[object, list[UnitFamily]] = {}
    for family in families:
        together_by.setdefault(ranking.key(family), []).append(family)
    kept: dict[str, list[int]] = {}
    for members in together_by.values():
        together = torch.cat([scores[family.name] for family in members])
        # A stable order: of equal numbers the first leaves first.
        gone = torch.zeros(len(together), dtype=torch.bool)
        gone[together.argsort(stable=True)[: int(share * len(together) + 1e-9)]] = True
        for family, gone_U in zip(members, gone.split([family.num_units for family in members]), strict=True):
            kept[family.name] = _limited(scores[family.name], int((~gone_U).sum()), limits)
    return kept


def _limited(scores_U: Tensor, num_keep: int, limits: Limits) -> list[int]:
    """List the best units, as many as asked for or as the limits want."""
    size = len(scores_U)
    num_keep = max(num_keep, size - int(limits.max_share * size), 1)
    if size > limits.multiple_of:
        num_keep = min(-(-num_keep // limits.multiple_of) * limits.multiple_of, size)
    else:
        num_keep = size if limits.multiple_of > 1 else num_keep
    # Of equal numbers the first leave first, as above.
    return sorted(scores_U.argsort(stable=True)[size - num_keep :].tolist())
