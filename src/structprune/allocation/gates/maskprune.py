"""MaskPrune's minimax (arXiv 2502.14008), reconstructed from the mechanics of UVC (ICLR 2022).

There is no code of MaskPrune; its problem is in the abstract: min over masks m, max over y >= 0 of L(m) + y times the
sum of squares of the masks of the units that are to go. From UVC's code: a step of the masks along the loss's gradient,
then the smallest ones, as many as go, are divided by 1 + 2 rate y; y rises by that sum of squares. There the number of
units s that go is learned too, one for all sublayers of a kind; here the budget decides it before, by the allocator,
and every sublayer keeps its width (with --structure uniform, one for all). The model runs with the hard choice.

Shape suffixes: U units of all sublayers in scope.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structprune.allocation.gates.gate import GateProblem, Gates, adam_direction, learning_rate

_RATE = 1e-2
_DUAL_RATE = 1e-1
_FIRST_DUAL = 1e-3
_BETAS = (0.9, 0.99)


class _Learner:
    def __init__(self, problem: GateProblem) -> None:
        self._problem = problem
        self._rate = learning_rate(_RATE, problem.num_steps) / 2
        # A mask is between 0 and 1, a score between -1 and 1.
        dual = torch.full((len(problem.budgets),), _FIRST_DUAL, dtype=torch.float64)
        self.state = {"mask": (problem.bounded(problem.start_U) + 1) / 2, "dual": dual}

    def masks(self) -> list[Tensor]:
        return [self.keep().double()]

    def step(self, gradient_U: Tensor | None, losses: Sequence[float], share: float) -> None:
        assert gradient_U is not None
        problem, rate = self._problem, self._rate * share
        direction_U = adam_direction(self.state, problem.net(gradient_U), _BETAS)
        mask_U = torch.where(problem.free_U, self.state["mask"] - rate * direction_U, self.state["mask"])
        leaving_U = problem.free_U & ~problem.keep(2 * mask_U - 1)
        dual_U = torch.cat([d.expand(b.num_units) for d, b in zip(self.state["dual"], problem.budgets, strict=True)])
        mask_U = torch.where(leaving_U, mask_U / (1 + 2 * rate * dual_U), mask_U)
        self.state["mask"] = torch.where(problem.free_U, mask_U.clamp(0.0, 1.0), mask_U)
        excess = [(part.square() * gone).sum() for part, gone in self._by_sublayer(leaving_U)]
        self.state["dual"] = (self.state["dual"] + _DUAL_RATE * share * torch.stack(excess)).clamp_min(0.0)

    def keep(self) -> Tensor:
        return self._problem.keep(2 * self.state["mask"] - 1)

    def _by_sublayer(self, leaving_U: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = self._problem.parts(self.state["mask"])
        return list(zip(parts, self._problem.parts(leaving_U), strict=True))


MASKPRUNE = Gates(
    start=_Learner, paper="after the abstract of arXiv 2502.14008 and the code of UVC; reconstructed", keeps_widths=True
)
