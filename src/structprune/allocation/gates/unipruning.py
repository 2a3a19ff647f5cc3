"""The coordination of UniPruning (arXiv 2510.03291): a running score of what every unit is worth.

Read in the authors' code: z += 0.01 (S - G), where S is a score of the weights on the step's text and G is z less the
value that a thousandth of all lie below (a soft threshold, the mirror step); the largest z stay. There S is brought to
one mean in every layer and the choice is made layer by layer, so nothing is shared out between layers. Here both are
left out: S is the squared derivative of the loss by the gate, per parameter, at the scale of the prices that the scores
begin with, and one threshold holds for all sublayers. The updates of the weights beside it are left out: consumers are
solved anew. With few steps the rate is higher.

Shape suffixes: U units of all sublayers in scope.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structprune.allocation.gates.gate import GateProblem, Gates

_RATE = 1e-2
_QUANTILE = 1e-3
_TINY = 1e-12


class _Learner:
    def __init__(self, problem: GateProblem) -> None:
        self._problem = problem
        self._rate = max(_RATE, min(0.5, 2 / max(1, problem.num_steps)))
        self.state = {"value": problem.start_U.exp(), "scale": torch.zeros((), dtype=torch.float64)}

    def masks(self) -> list[Tensor]:
        return [self.keep().double()]

    def step(self, gradient_U: Tensor | None, losses: Sequence[float], share: float) -> None:
        assert gradient_U is not None
        problem, value_U = self._problem, self.state["value"]
        found_U = gradient_U.square() / problem.size_U
        free_U = problem.free_U
        if not bool(free_U.any()) or float(found_U[free_U].mean()) <= 0:
            return
        if float(self.state["scale"]) == 0:
            # One scale for all sublayers and steps: texts with larger gradients count more.
            self.state["scale"] = value_U[free_U].mean() / found_U[free_U].mean()
        cut = value_U[free_U].quantile(_QUANTILE)
        mirrored_U = (value_U - cut).clamp_min(0.0)
        moved_U = value_U + self._rate * (found_U * self.state["scale"] - mirrored_U)
        self.state["value"] = torch.where(free_U, moved_U.clamp_min(_TINY), value_U)

    def keep(self) -> Tensor:
        return self._problem.keep(self._score())

    def _score(self) -> Tensor:
        """Bring the values to the band: the largest and the smallest logarithm are its ends."""
        log_U = self.state["value"].clamp_min(_TINY).log()
        free_U = self._problem.free_U
        if not bool(free_U.any()):
            return log_U
        low, high = log_U[free_U].aminmax()
        return (log_U - (low + high) / 2) / ((high - low) / 2).clamp_min(_TINY)


UNIPRUNING = Gates(start=_Learner, paper="arXiv 2510.03291; its coordination, read in the authors' code, changed")
