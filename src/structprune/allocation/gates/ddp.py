"""Soft gates that become hard: a deterministic surrogate of the number of units (after DDP, arXiv 2603.08065).

Of the paper only the abstract could be read: masks alone are trained, through a deterministic soft surrogate of the
L0 norm. All else is reconstructed. The gate is the hard-concrete one without its noise, z = clip(1.2 sigmoid((g - t) /
b) - 0.1, 0, 1); b falls from 0.5 to 0.05 while it learns. t is such that the gates' sum of parameters is that of the
choice at the start, in every step, in place of a penalty; the derivative takes into account that t moves with g.

Shape suffixes: U units of all sublayers in scope.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structprune.allocation.across import bisected
from structprune.allocation.gates.gate import GateProblem, Gates, adam_direction, learning_rate

_RATE = 1e-2
_BETAS = (0.9, 0.999)
_LOW, _HIGH = -0.1, 1.1
_WIDEST, _NARROWEST = 0.5, 0.05
_FARTHEST = 10.0


class _Learner:
    def __init__(self, problem: GateProblem) -> None:
        self._problem = problem
        self._rate = learning_rate(_RATE, problem.num_steps)
        self.state = {"score": problem.start_U.clone(), "number": torch.zeros((), dtype=torch.float64)}

    def masks(self) -> list[Tensor]:
        return [self._gates()[0]]

    def step(self, gradient_U: Tensor | None, losses: Sequence[float], share: float) -> None:
        assert gradient_U is not None
        slope_U, size_U = self._gates()[1], self._problem.size_U
        weight = float((slope_U * size_U).sum())
        price = float((slope_U * gradient_U).sum()) / weight if weight > 0 else 0.0
        direction_U = adam_direction(self.state, slope_U * (gradient_U - price * size_U), _BETAS)
        self.state["score"] = self._problem.bounded(self.state["score"] - self._rate * share * direction_U)

    def keep(self) -> Tensor:
        return self._problem.keep(self.state["score"])

    def _gates(self) -> tuple[Tensor, Tensor]:
        """Compute gates that meet the budget, and their derivatives by the scores at a fixed t."""
        problem, score_U = self._problem, self.state["score"]
        progress = min(1.0, float(self.state["number"]) / max(1, problem.num_steps))
        width = _WIDEST * (_NARROWEST / _WIDEST) ** progress
        wanted = float(problem.size_U[problem.stays_U].sum())

        def gates(shift: float) -> Tensor:
            chance_U = torch.sigmoid((score_U - shift) / width)
            soft_U = ((_HIGH - _LOW) * chance_U + _LOW).clamp(0.0, 1.0)
            return torch.where(problem.free_U, soft_U, problem.stays_U.double())

        # A higher threshold opens less.
        shift = -bisected(lambda x: float((gates(-x) * problem.size_U).sum()), wanted, -_FARTHEST, _FARTHEST)
        gate_U = gates(shift)
        chance_U = torch.sigmoid((score_U - shift) / width)
        slope_U = (_HIGH - _LOW) * chance_U * (1 - chance_U) / width
        moving_U = problem.free_U & (gate_U > 0) & (gate_U < 1)
        return gate_U, torch.where(moving_U, slope_U, 0.0)


DDP = Gates(start=_Learner, paper="after the abstract of arXiv 2603.08065; reconstructed")
