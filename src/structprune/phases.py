"""Names of the stretches of a run: one vocabulary for planner, meter, reports and tests."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NewType

from structprune.kinds import UnitKind


class Phase(StrEnum):
    """A stretch of a run whose peak is planned, and measured where it can be told apart; the value is in reports."""

    CALIBRATION_TEXT = "calibration text"
    EMBED = "embed"
    READ_BLOCK = "read block"
    PROPAGATE = "propagate"
    WRITE_BLOCK = "write block"
    COPY_OUTER = "copy embeddings and head"
    PERPLEXITY = "perplexity of the calibration text"
    HELD_OUT = "perplexity of held-out windows"
    ANGULAR_DISTANCES = "angular distances"
    MEASURED_LOSSES = "measured losses"
    SENSITIVITY_BACKWARD = "sensitivity: backward"
    SENSITIVITY_LOSS = "sensitivity: loss"
    SENSITIVITY_SCORES = "sensitivity: scores"
    GATES = "gates"
    SEARCH_STATISTICS = "search: statistics"
    SEARCH_CANDIDATES = "search: candidates"
    ITERATE = "iterate"
    REPAIR = "repair"
    MERGED_ROWS = "merged rows"
    SLICE_STATISTICS = "statistics"
    SLICE_EIGENVECTORS = "eigenvectors"
    ROTATE_BLOCK = "rotate block"
    ROTATE_EMBEDDINGS = "rotate embeddings"
    ROTATE_HEAD = "rotate head"


class SublayerPhase(StrEnum):
    """A stretch that every kind of sublayer in scope has one of; `of` names it."""

    STATISTICS = "statistics"
    SOLVE = "solve"
    REMOVAL_COSTS = "sensitivity: costs"
    SEARCH_ORDER = "search: order"
    SEARCH_SOLVE = "search: solve"

    def of(self, kind: UnitKind) -> PhaseOfSublayer:
        """Name this stretch for one kind: `solve (mlp)`."""
        return PhaseOfSublayer(f"{self} ({kind})")


PhaseOfSublayer = NewType("PhaseOfSublayer", str)
"""Made by `SublayerPhase.of` and nowhere else, so that a phase without a bound is a type error."""
PhaseName = Phase | PhaseOfSublayer
PhaseBytes = dict[PhaseName, int]
"""Phase -> bytes at its peak, in the order in which plans and reports list them."""


def largest(several: Iterable[PhaseBytes]) -> PhaseBytes:
    """Return every phase with the highest of its peaks."""
    found: PhaseBytes = {}
    for phases in several:
        found |= {phase: max(num_bytes, found.get(phase, 0)) for phase, num_bytes in phases.items()}
    return found


def fullest(phases: PhaseBytes) -> PhaseName:
    """Return the phase whose peak is the highest, the first of several."""
    return max(phases, key=lambda phase: phases[phase])


def by_name(phases: PhaseBytes) -> dict[str, int]:
    """Return the same bytes under the names that reports and plans are written with."""
    return {str(phase): num_bytes for phase, num_bytes in phases.items()}
