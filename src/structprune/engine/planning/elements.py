"""Bytes of the phases in which single weights are pruned, from shapes; the common phases bound the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from structprune.linalg.gram_products import strip_rows
from structprune.phases import PhaseBytes, SublayerPhase, largest
from structprune.solvers.elements.unit import choice_bytes, judged_bytes, wanted_bytes
from structprune.statistics.gram import NUM_STRIPS
from structprune.types import UnitKind


@dataclass(frozen=True, slots=True, kw_only=True)
class MapProblem:
    """The maps that read one tensor, by their sizes."""

    inputs: int
    outputs: int
    """The widest map's."""
    read: bool
    """Whether anything is summed."""
    squares: bool
    """Whether the products of all pairs of inputs are summed, or their squares alone."""
    followed: bool
    """Whether products with the dense model's inputs are summed too."""
    sets: int
    """Sums that are kept apart: those that are fitted, and those that choose the ridge."""
    permuted: bool
    """Whether the inputs may get another order."""
    workspace: int
    """Bytes of the pruner or the update, whichever is more, beside sums and weight."""
    shared: int = 0
    """Bytes of that which stay for the other maps."""

    @property
    def gram(self) -> int:
        """Bytes of one square in float32."""
        return 4 * self.inputs**2 if self.squares else 0

    @property
    def sums(self) -> int:
        """Bytes of all sums."""
        return self.sets * (self.gram * (2 if self.followed else 1) + 24 * self.inputs)

    @property
    def solve(self) -> int:
        """Bytes of choosing the ridge, and of choosing, solving and judging one map, with the sums."""
        inputs, outputs = self.inputs, self.outputs
        weight, apart = inputs * outputs, self.sets > 1
        # What is wanted of a map by each set, on the dense path.
        wanted = self.sets * 4 * weight + wanted_bytes(inputs, outputs) if self.followed else 0
        choice = self.sums + choice_bytes(inputs, outputs) if apart else 0
        # Of the windows that chose the ridge half a square stays, made beside the whole.
        packing = self.sums + (self.gram // 2 if apart else 0)
        kept = self.gram + (self.gram // 2 if apart else 0) + (self.sets * self.gram if self.followed else 0)
        # In another order sums are new ones, of half a square by way of a whole one. The score is four of the weight;
        # channels are exchanged by it, by its columns and by those of one place with what is compared.
        moving = kept + max(2 * self.gram, 4 * 4 * weight) + 4 * 4 * weight if self.permuted else 0
        # The answer, its stored form and its mask; or that, the mask and the dense weight with the mask.
        judged = weight * (4 + 4 + 1) + judged_bytes(inputs, outputs)
        strip = strip_rows(inputs, inputs) * (inputs * (4 + 4 + 8) + outputs * 8 * 2)
        # What the map's weight was, and what it is where the forward pass has another dtype, are the block's.
        solving = kept + 24 * inputs * self.sets + max(self.workspace, self.shared + judged)
        return max(choice, packing, moving, solving) + wanted + strip


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """Maps that are measured in one pass."""

    kind: UnitKind
    problems: tuple[MapProblem, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What host or device holds beside the sums, in bytes where nothing else is said."""

    block: int
    """The block, the streams and the process."""
    again: int
    """The block's pruned maps beside the dense ones, where the dense path is followed."""
    activations: int
    tokens: int
    """Tokens of one micro-batch."""
    item: int
    """Bytes of a number in the forward passes."""
    sums: bool = True
    """Whether the sums lie here."""
    solves: bool = True
    """Whether maps are solved here."""


def element_phases(steps: Iterable[StepMemory], beside: Beside) -> PhaseBytes:
    """Plan the peaks of measuring and solving each kind of sublayer."""
    return largest(_phases(step, beside) for step in steps)


def _phases(step: StepMemory, beside: Beside) -> PhaseBytes:
    held = beside.block + beside.again
    taken = [problem.sums if beside.sums else problem.gram // NUM_STRIPS for problem in step.problems]
    widest = max(step.problems, key=lambda problem: problem.inputs)
    # A micro-batch of inputs, in float32 too, and of both models' where both are summed.
    copies = (1 if beside.item == 4 else 2) + (1 if widest.followed else 0)
    batch = beside.tokens * (widest.inputs * 4 * copies + (widest.outputs * beside.item if widest.followed else 0))
    # Activations are gone when the lower triangle is filled in, by tiles of a sixteenth.
    phases: PhaseBytes = {
        SublayerPhase.STATISTICS.of(step.kind): held
        + sum(taken)
        + max(beside.activations + batch, 3 * widest.gram // 16)
    }
    if beside.solves:
        sums = sum(problem.sums for problem in step.problems)
        solve = max(problem.solve - problem.sums for problem in step.problems)
        phases[SublayerPhase.SOLVE.of(step.kind)] = held + sums + solve
    return phases
