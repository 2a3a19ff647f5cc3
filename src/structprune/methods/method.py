"""What a method is: names from the registries below, and where it was published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from structprune.types import UnitKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A composition; the engine runs all of one walk in the same block loop."""

    name: str
    title: str
    paper: str
    summary: str
    provenance: Literal["published formula", "read in public code", "derived", "reconstructed", "baseline"]
    walk: Literal["units", "slice"] = "units"
    """What the block loop does: remove units of each block, or cut the residual stream that all blocks share.

    Score, allocator and solver are empty for `slice`, which has none.
    """
    score: str = ""
    """A score of `SCORES` (the best stay) or a selector of `SELECTORS`."""
    allocator: str = ""
    solver: str = ""
    needs_statistics: bool
    """Whether the decision or the solver reads activation statistics."""
    survey: Literal["none", "scores", "loss"] = "none"
    """What is measured on the dense model first: nothing, each unit's score, or what its removals cost the loss."""
    temperature: float = 0.0
    """Of the method's own allocator."""
    target: Literal["local", "dense-path"] = "local"
    damping: float | Literal["auto"] = 1e-4
    kinds: tuple[UnitKind, ...] = ("mlp",)
    """Unit kinds that this version of the method removes."""
