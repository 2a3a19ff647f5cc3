"""Solvers: from one problem and the kept units to the consumer's new weight.

Iterative ones change the producers too. Read first: `solver.py`, `least_squares.py`; then `mlp/iterate.py`.
"""

from structprune.registry import Registry
from structprune.solvers.solver import Solver

SOLVERS: Registry[Solver] = Registry(
    "solver",
    Solver,
    {
        "mask-only": "structprune.solvers.least_squares:MASK_ONLY",
        "bias": "structprune.solvers.least_squares:BIAS",
        "least-squares": "structprune.solvers.least_squares:LEAST_SQUARES",
        "admm": "structprune.solvers.mlp.admm:ADMM",
        "admm-duals": "structprune.solvers.mlp.admm:ADMM_DUALS",
        "alternating": "structprune.solvers.mlp.alternating:ALTERNATING",
    },
    group="structprune.solvers",
)
