"""Settings of a run on any module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from structprune.errors import InputError
from structprune.modules.choice import RANKINGS
from structprune.modules.costs import COSTS
from structprune.modules.eligible import CHOICES
from structprune.modules.importance import IMPORTANCES, NORMALISATIONS, REDUCTIONS, entry
from structprune.modules.layout import UnitFamily

LATENCY = "latency"
"""The cost that is measured, instead of counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRecipe:
    """How a module is pruned: how much, what counts, what is ranked with what, and what is solved again.

    Raises InputError for numbers out of range and for names that are not there.
    """

    sparsity: float
    """Share of the cost that goes, above 0 and below 1."""
    cost: str = "parameters"
    """What the sparsity is a share of: `parameters`, `macs` (multiplications for one example), or `latency`, seconds of
    one call on this machine."""
    importance: str = "magnitude"
    """`magnitude` (w^2), `taylor` (|w g|) and `hessian` (w^2 g^2 / 2), which need a loss, or `reconstruction`, the
    error that a removal adds where the weights that read the unit are solved again."""
    reduction: str = "mean"
    """How a unit's tensors become one number: `mean`, `sum`, `max` or `first`."""
    normalisation: str = "mean"
    """How families are made comparable: `none`, `mean`, `max`, `sum`, `gaussian` or `lamp`."""
    ranking: str = "local"
    """Who is ranked together: each family by itself (`local`), all (`global`), all that are isomorphic (`pattern`), or
    all by the error that their absence is measured to make, for what they cost (`measured`)."""
    steps: int = 1
    """Rounds of scores, choice, repair and removal, each with its part of the sparsity."""
    repair: bool = True
    """Whether linear maps and convolutions that read removed units are solved again by least squares."""
    max_share: float = 0.9
    """Largest share of a family that leaves in one step."""
    multiple_of: int = 1
    """What the number of units that stay is a multiple of."""
    families: str | Callable[[UnitFamily], bool] = "native"
    """Which families lose units: those that the model's own code runs without (`native`), those of which a stock config
    can have fewer (`stock`), all (`all`), or a choice of one's own."""
    protect: tuple[str, ...] = ()
    """Names of families that stay whole, or patterns of names such as `*.decoder.*`."""
    allow_coupled: bool = False
    """Whether units that a LayerNorm, a GroupNorm or a softmax sees together may leave."""

    def __post_init__(self) -> None:
        for name, value, fits, wanted in (
            ("sparsity", self.sparsity, 0 < self.sparsity < 1, "a share above 0 and below 1"),
            ("steps", self.steps, self.steps >= 1, "1 or more"),
            ("max_share", self.max_share, 0 < self.max_share <= 1, "a share above 0, at most 1"),
            ("multiple_of", self.multiple_of, self.multiple_of >= 1, "1 or more"),
        ):
            if not fits:
                raise InputError("this value is out of range", where=name, got=value, wanted=wanted)
        if isinstance(self.families, str):
            CHOICES.check(self.families)
        if self.cost not in COSTS and self.cost != LATENCY:
            raise InputError(f"unknown cost {self.cost!r}", wanted=", ".join((*COSTS, LATENCY)))
        IMPORTANCES.check(self.importance)
        RANKINGS.check(self.ranking)
        entry(REDUCTIONS, self.reduction, "reduction")
        entry(NORMALISATIONS, self.normalisation, "normalisation")
