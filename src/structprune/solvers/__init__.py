"""Solvers: one block's problem and the kept units -> the consumer's new weight."""

from collections.abc import Callable

from torch import Tensor

from structprune.registry import Registry
from structprune.types import LayerProblem, SolveResult

Solver = Callable[[LayerProblem, Tensor], SolveResult]

SOLVERS: Registry[Solver] = Registry(
    "solver",
    {
        "mask-only": "structprune.solvers.restoration:mask_only",
        "least-squares": "structprune.solvers.restoration:least_squares",
    },
)
