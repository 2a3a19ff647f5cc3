"""GRASPrune (arXiv 2604.19398): one sort of all scores down to the budget, and gradients straight through it.

Read in the authors' code: p = sigmoid(g / 1.5) for every channel and KV group; in each step all p are sorted together
and kept while the sum of their costs allows; forward with that mask, and dp/dg in the place of the mask's derivative;
AdamW at 1e-2, betas 0.9 and 0.99, no decay. Changed here: scores begin at the prices of the removals instead of 0
(there the order of the sort decides the first mask), heads have one gate on what the consumer reads instead of one on
keys and one on values, units far from the threshold do not learn, with few steps the rate is higher, and the budget's
price is taken from the derivatives: AdamW steps by signs, and nearly every gate wants to be open. The scales that the
authors train afterwards are left out: consumers are solved anew.

Shape suffixes: U units of all sublayers in scope.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structprune.allocation.gates.gate import GateProblem, Gates, adam_direction, learning_rate

_TEMPERATURE = 1.5
_RATE = 1e-2
_BETAS = (0.9, 0.99)


class _Learner:
    def __init__(self, problem: GateProblem) -> None:
        self._problem = problem
        self._rate = learning_rate(_RATE, problem.num_steps)
        self.state = {"score": problem.start_U.clone()}

    def masks(self) -> list[Tensor]:
        return [self.keep().double()]

    def step(self, gradient_U: Tensor | None, losses: Sequence[float], share: float) -> None:
        assert gradient_U is not None
        score_U = self.state["score"]
        chance_U = torch.sigmoid(score_U / _TEMPERATURE)
        slope_U = self._problem.net(gradient_U) * chance_U * (1 - chance_U) / _TEMPERATURE
        direction_U = adam_direction(self.state, slope_U, _BETAS)
        self.state["score"] = self._problem.bounded(score_U - self._rate * share * direction_U)

    def keep(self) -> Tensor:
        return self._problem.keep(self.state["score"])


GRASPPRUNE = Gates(start=_Learner, paper="arXiv 2604.19398; read in the authors' code, changed")
