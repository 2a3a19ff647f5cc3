"""Solvers: from one problem and the kept units to the consumer's new weight.

Iterative ones change the producers too. Read first: `least_squares.py`; then `mlp/iterate.py`.
"""

from collections.abc import Callable

from torch import Tensor

from structprune.registry import Registry
from structprune.solvers.mlp.block import MlpSolution, MlpTokens, MlpWeights
from structprune.types import LayerProblem, SolveResult

Solver = Callable[[LayerProblem, Tensor], SolveResult]

SOLVERS: Registry[Solver] = Registry(
    "solver",
    {
        "mask-only": "structprune.solvers.least_squares:mask_only",
        "bias": "structprune.solvers.least_squares:mean_bias",
        "least-squares": "structprune.solvers.least_squares:least_squares",
        # Before and after the alternation; see ITERATIVE.
        "admm": "structprune.solvers.least_squares:judged_least_squares",
        "admm-duals": "structprune.solvers.least_squares:judged_least_squares",
        "alternating": "structprune.solvers.least_squares:judged_least_squares",
    },
)

IterativeUpdate = Callable[[MlpTokens, MlpWeights], MlpSolution]

ITERATIVE: Registry[IterativeUpdate] = Registry(
    "iterative solver",
    {
        "admm": "structprune.solvers.mlp.admm:solve_mlp",
        "admm-duals": "structprune.solvers.mlp.admm:solve_mlp_with_duals",
        "alternating": "structprune.solvers.mlp.alternating:alternate",
    },
)
"""Solvers that also propose new producers, from tokens instead of sums."""

NUM_LATENTS = {"admm": 2, "admm-duals": 5, "alternating": 1}
"""Of an iterative solver, the tensors as wide as the MLP that it holds for all of its tokens, at most."""
