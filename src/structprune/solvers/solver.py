"""What a solver is: the functions, what they read of a problem, what they change, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from structprune.solvers.mlp.block import MlpSolution, MlpTokens, MlpWeights
from structprune.types import LayerProblem, SolveResult, Statistic

Changed = Literal["consumer", "producers", "biases"]
"""What moves beside what is cut: weights of the consumer, weights of the maps before it, the consumer's bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """An answer to one block's problem once its units are chosen."""

    solve: Callable[[LayerProblem, Tensor], SolveResult]
    """(problem, mask of the kept units) -> the consumer's weight on what is kept."""
    propose: Callable[[MlpTokens, MlpWeights], MlpSolution] | None = None
    """New producers of a pruned MLP, from tokens instead of sums; kept only if held-out windows are met better by them
    with the consumer solved again behind them, so `solve` says its `held_out_error`. None: producers only lose rows."""
    reads: Set[Statistic]
    """What of the problem has to be measured for it; the weights are always there."""
    changes: Set[Changed]
    num_latents: int = 0
    """Tensors as wide as the MLP that `propose` holds for all of its tokens, at most."""

    def __post_init__(self) -> None:
        assert (self.propose is not None) == ("producers" in self.changes) == ("tokens" in self.reads)
