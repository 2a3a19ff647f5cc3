"""Bytes that deciding and solving one group takes beside the block, from shapes: what `layerwise/block.py` holds.

The bound follows the code of scores and solvers line by line; the memory tests compare it with what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from structprune.linalg.gram_products import strip_rows
from structprune.scores import SELECTORS, score_or_selector
from structprune.solvers.least_squares import NUM_TRIALS, SKETCH_ROWS
from structprune.solvers.mlp.block import CHUNK_TOKENS

# What the linear algebra library keeps for its factorisations.
_LIBRARY_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupProblem:
    """One group's problem by its sizes."""

    inputs: int
    outputs: int
    kept: int | None
    """Inputs that stay, where that is known before the run."""
    stored_item: int
    """Bytes of a number in the checkpoint."""
    score: str
    solves: bool
    """Whether the consumer is solved again, and not only cut."""
    held_out_sums: int
    """How many sums are kept apart to choose the ridge: one, or one for each of several texts; 0 where it is given."""
    judged: bool
    """Whether the answer is also solved without the held-out windows."""
    follows_dense: bool
    costed: bool
    """Whether the sensitivity of the consumer's output is part of the problem."""
    reordered: bool
    """Whether the inputs of a unit lie apart, so that the sums are brought into another order."""

    @property
    def alone(self) -> GroupProblem:
        """The same for what it gives by itself: no windows kept apart, no other target, any number of units kept."""
        return replace(self, held_out_sums=0, follows_dense=False, judged=False, kept=None)

    @property
    def gram(self) -> int:
        """Bytes of the Gram in float32."""
        return self.inputs**2 * 4

    @property
    def _weight(self) -> int:
        """Bytes of the weight in float64."""
        return self.inputs * self.outputs * 8

    @property
    def cross(self) -> int:
        """Sum of targets times inputs in float32; nothing for the local target."""
        return self._weight // 2 if self.follows_dense else 0

    @property
    def _strip(self) -> int:
        """Rows of a Gram, those of them that are wanted, the same in float64, and a product as wide as the outputs."""
        rows = strip_rows(self.inputs, self.inputs)
        return rows * (self.inputs * (4 + 4 + 8) + self.outputs * 8 * 2)

    @property
    def _metric(self) -> int:
        """Sensitivity in float64 and its factor."""
        return 2 * self.outputs**2 * 8 if self.costed else 0

    @property
    def sums(self) -> int:
        """The sums over the windows to fit, and those over the held-out ones; what they give together is never made."""
        return (self.gram + self.cross) * (1 + self.held_out_sums)

    @property
    def decide(self) -> int:
        """Score or search beside the sums."""
        workspace = score_or_selector(self.score).workspace
        return workspace.grams * 2 * self.gram + workspace.consumers * self._weight + self._metric + self._strip

    @property
    def removal_costs(self) -> int:
        """Pricing its removals on the dense model, one after the other, whatever decides later; beside the sums."""
        return replace(self, score="greedy", held_out_sums=0, follows_dense=False).decide

    @property
    def solve(self) -> int:
        """Everything between the last forward pass and the new weight."""
        ordered = self.inputs * self.outputs * self.stored_item
        # Each in another order, and the rows of the last one in theirs.
        reordering = (self.sums + self.gram) * self.reordered
        # The norms of the producers, which are as large as the consumer: in float32, in order, squared.
        norms = 3 * self.inputs * self.outputs * 4
        phases = [reordering, norms, self.decide, self._errors]
        if self.solves:
            phases.append(self._least_squares)
        if self.score in SELECTORS:
            phases.append(2 * self._square(self._kept_bound, self._removed_bound) + 2 * self._weight + self._strip)
        return self.sums + ordered + max(phases) + _LIBRARY_BYTES

    @property
    def _kept_bound(self) -> int:
        return self.inputs if self.kept is None else self.kept

    @property
    def _removed_bound(self) -> int:
        return self.inputs if self.kept is None else self.inputs - self.kept

    @property
    def _kept_weight(self) -> int:
        """The consumer on its kept inputs, in float64."""
        return self._kept_bound * self.outputs * 8

    def _square(self, *orders: int) -> int:
        """Return the bytes of the largest square of these orders, in float32."""
        return max(orders) ** 2 * 4

    @property
    def _least_squares(self) -> int:
        # The right side is a product of the whole weight where the target is the dense path's, else of what is removed
        # of it; that is gone when the kept square is made.
        whole = self._weight if self.follows_dense else self._removed_bound * self.outputs * 8
        square = max(2 * self._square(self._kept_bound), whole) + self._strip
        # With the second correction the first one's answer is there.
        last = square + self._kept_weight * (2 if self.follows_dense else 1)
        if not self.held_out_sums:
            return last
        return max(last, self._trials, self._errors if self.judged else 0)

    @property
    def _trials(self) -> int:
        # Of the mixed weight, targets and rests, all inputs; of right sides, answers and what is compared, kept ones.
        rows = min(SKETCH_ROWS, self.outputs)
        mixed = rows * 8 * (3 * self.inputs + (3 + self.held_out_sums + NUM_TRIALS) * self._kept_bound)
        # Where texts are apart, the errors of the cut weight come first.
        errors = self._errors + self._kept_weight // 2 if self.held_out_sums > 1 else 0
        return max(2 * self._square(self._kept_bound), errors) + self._strip + mixed

    @property
    def _errors(self) -> int:
        """Bytes for the errors of the cut and of the solved weight.

        These are the difference to the whole weight, or the weight and its product with targets.
        """
        return (2 * self._kept_weight if self.follows_dense else self._weight) + 2 * self._strip


def iteration_bytes(tokens: int, hidden: int, inputs: int, num_latents: int) -> int:
    """Return the bytes that an iterative solver holds beside the blocks, for an MLP with `inputs` channels left."""
    return (
        # Inputs and targets, one of them in pieces too; z, s and duals; the temporaries of a chunk.
        tokens * (3 * hidden + num_latents * inputs) * 4
        + min(tokens, CHUNK_TOKENS) * 20 * inputs * 4
        # Float32 weights of three states, moments and a factorisation in float64.
        + 9 * inputs * hidden * 4
        + 6 * inputs * hidden * 8
        + 3 * 2 * inputs**2 * 4
    )
