"""What a method is: names from the registries below, and where it was published."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from structprune.allocation import ALLOCATORS
from structprune.kinds import HeadUnits, Provenance, UnitKind


class SensitivityKind(StrEnum):
    """What is measured on the dense model first."""

    NONE = "none"
    SCORES = "scores"
    """Each unit's score."""
    LOSS = "loss"
    """What each unit's removal adds to the loss."""
    TAYLOR = "taylor"
    """The gradient of the loss by each unit's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A composition; the engine runs all those of one pipeline in the same block loop."""

    name: str
    title: str
    paper: str
    summary: str
    provenance: Provenance
    pipeline: Literal["units", "depth", "experts", "slice", "elements"] = "units"
    """Which loop of the engine runs it: units of every block go, whole blocks or experts go, the stream is cut, or
    single weights become zero.

    Score, allocator and solver are empty for `slice`, which has none.
    """
    patterned: Method | None = None
    """What the same name means where a pattern is given: single weights go instead. None: it has no patterns, or
    nothing else."""
    score: str = ""
    """A score of `SCORES` (the best stay) or a selector of `SELECTORS`; for the depth pipeline, one of `BLOCK_SCORES`;
    for that over single weights, one of `PRUNERS`.

    The pipeline over experts has one score of its own.
    """
    allocator: str = ""
    solver: str = ""
    """A solver of `SOLVERS`; for the pipeline over single weights, one of `UPDATES`."""
    counts: Literal["layer", "row"] = "layer"
    """Whether every row of a matrix loses as many single weights, or the matrix as a whole."""
    needs_statistics: bool
    """Whether the decision or the solver reads activation statistics."""
    sensitivity: SensitivityKind = SensitivityKind.NONE
    """What its score reads of the dense model, whatever the allocator."""
    protect: tuple[float, float] = (0.0, 0.0)
    """Shares of the blocks, at the start and at the end, that lose nothing unless the recipe says how many."""
    temperature: float = 0.0
    """Temperature of the method's own allocator."""
    target: Literal["local", "dense-path"] = "local"
    damping: float | Literal["auto"] = 1e-4
    shrinkage: float = 0.0
    """Share of the correlations between units that greedy removal does not count on."""
    kinds: tuple[UnitKind, ...] = ("mlp",)
    """Unit kinds that this version of the method removes."""
    head_units: HeadUnits = "kv-group"
    """What attention loses unless the recipe says otherwise."""

    def for_pattern(self, *, given: bool) -> Method:
        """Return what the name means with a pattern or without one."""
        return self.patterned if given and self.patterned is not None else self

    def in_pipeline(self, pipeline: str) -> Method:
        """Return what the name means in one pipeline, that of a recipe."""
        return self if self.pipeline == pipeline or self.patterned is None else self.patterned

    def sensitivity_for(self, allocator: str) -> SensitivityKind:
        """Find what is measured where `allocator` sets the widths: what the method reads, else what that compares."""
        compared = SensitivityKind(ALLOCATORS.get(allocator).compares)
        return compared if self.sensitivity is SensitivityKind.NONE else self.sensitivity

    def protected_blocks(self, num_blocks: int) -> tuple[int, int]:
        """Return how many blocks at the start and at the end lose nothing by default: the shares, rounded down."""
        first, last = self.protect
        return int(first * num_blocks), int(last * num_blocks)
