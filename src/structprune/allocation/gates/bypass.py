"""Bypassing back-propagation (arXiv 2406.10576): each unit stays with a chance of its own, learned from losses alone.

Read in the authors' code: two masks are drawn for each batch, and s -= rate (L - d) (m - s) / sqrt(s (1 - s)) for each,
with d a running mean of the losses; then s is lowered until the mean of all s is the share to keep. Changed here: the
baseline of a mask is the loss of the other, drawn on the same window, so that the estimate of the derivative of the
mean loss has no bias, and steps are in units of what two losses differ by; chances stay between 0.02 and 0.98, for
those that reach an end are never drawn again; they are moved up as well as down to the budget; they begin at the prices
of the removals, and only those near the threshold are drawn. No derivative of the model is taken.

Shape suffixes: U units of all sublayers in scope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structprune.allocation.across import bisected
from structprune.allocation.gates.gate import GateProblem, Gates

_NUM_SETS = 2
_LEAST = 0.02
_LARGEST_RATE = 0.25


class _Learner:
    def __init__(self, problem: GateProblem) -> None:
        self._problem = problem
        self._kept = float((problem.size_U * problem.stays_U).sum())
        # A difference of two losses says little of each of many units: what is true of one adds up over the steps, and
        # the rest, which is larger by the root of their number, does not.
        self._rate = min(_LARGEST_RATE, math.sqrt(int(problem.free_U.sum())) / max(1, problem.num_steps))
        chance_U = self._within(torch.sigmoid(2 * problem.start_U))
        self.state = {"chance": chance_U} | {
            name: torch.zeros((), dtype=torch.float64) for name in ("number", "spread")
        }

    def masks(self) -> list[Tensor]:
        seed = self._problem.seed * 1_000_003 + int(self.state["number"])
        generator = torch.Generator().manual_seed(seed)
        return [draw(self.state["chance"], generator) for _ in range(_NUM_SETS)]

    def step(self, gradient_U: Tensor | None, losses: Sequence[float], share: float) -> None:
        chance_U, number = self.state["chance"], self.state["number"] + 1
        slope_U = loss_slope(chance_U, self.masks(), losses)
        apart = abs(losses[0] - losses[1])
        spread = self.state["spread"] + (apart - self.state["spread"]) / number
        if float(spread) > 0:
            # The root as in the authors' code: chances near an end move less.
            moved_U = self._rate * share * slope_U * (chance_U * (1 - chance_U)).sqrt() / spread
            chance_U = self._within(chance_U - torch.where(self._problem.free_U, moved_U, 0.0))
        self.state = {"chance": chance_U, "number": number, "spread": spread}

    def keep(self) -> Tensor:
        return self._problem.keep(2 * self.state["chance"] - 1)

    def _within(self, chance_U: Tensor) -> Tensor:
        """Move the chances of the units that may change so that their parameters are kept on average."""
        problem, start_U = self._problem, self._problem.stays_U.double()

        def moved(shift: float) -> Tensor:
            return torch.where(problem.free_U, (chance_U + shift).clamp(_LEAST, 1 - _LEAST), start_U)

        return moved(bisected(lambda shift: float((moved(shift) * problem.size_U).sum()), self._kept, -1.0, 1.0))


def draw(chance_U: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one set of gates: each is 1 with its chance."""
    return (torch.rand(len(chance_U), generator=generator, dtype=torch.float64) < chance_U).double()


def loss_slope(chance_U: Tensor, masks: Sequence[Tensor], losses: Sequence[float]) -> Tensor:
    """Estimate the derivative of the mean loss by the chances, without bias: mean of (L - b) (m - s) / (s (1 - s)).

    The baseline b of a mask is the mean loss of the others. Units with a chance of 0 or 1 get 0.
    """
    total, others = sum(losses), len(losses) - 1
    variance_U = chance_U * (1 - chance_U)
    result_U = torch.zeros_like(chance_U)
    for mask_U, loss in zip(masks, losses, strict=True):
        baseline = (total - loss) / others
        result_U += (loss - baseline) * (mask_U - chance_U) / variance_U.clamp_min(1e-12) / len(losses)
    return torch.where(variance_U > 0, result_U, 0.0)


BYPASS = Gates(
    start=_Learner,
    paper="arXiv 2406.10576; read in the authors' code, changed",
    uses_gradient=False,
    num_sets=_NUM_SETS,
)
