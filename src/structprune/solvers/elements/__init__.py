"""Solvers of one matrix with zeros: which weights stay, and what the others become.

Read first: `problem.py`, what a pruner is given; `unit.py`, the same with inputs of unit energy; then `blockwise.py`.
"""

from structprune.registry import Registry
from structprune.solvers.elements.problem import Pruner, Update
from structprune.solvers.elements.shares import Sharing

PRUNERS: Registry[Pruner] = Registry(
    "pruner",
    Pruner,
    {
        "magnitude": "structprune.solvers.elements.scores:MAGNITUDE",
        "wanda": "structprune.solvers.elements.scores:WANDA",
        "ria": "structprune.solvers.elements.scores:RIA",
        "uniprune": "structprune.solvers.elements.scores:UNIPRUNE",
        "sparsegpt": "structprune.solvers.elements.blockwise:SPARSEGPT",
        "thanos": "structprune.solvers.elements.blockwise:THANOS",
        "apt": "structprune.solvers.elements.blockwise:APT",
        "alps": "structprune.solvers.elements.alps:ALPS",
        "fista": "structprune.solvers.elements.fista:FISTA",
        "fista-unit": "structprune.solvers.elements.fista:FISTA_UNIT",
    },
)
"""What decides which weights stay, and leaves weights of its own beside the zeros."""

UPDATES: Registry[Update] = Registry(
    "update",
    Update,
    {
        "own": "structprune.solvers.elements.updates:OWN",
        "mask-only": "structprune.solvers.elements.updates:MASK_ONLY",
        "sweep": "structprune.solvers.elements.updates:SWEEP",
        "refit": "structprune.solvers.elements.updates:REFIT",
        "swaps": "structprune.solvers.elements.swaps:SWAPS",
        "swaps-refit": "structprune.solvers.elements.swaps:SWAPS_REFIT",
        "dsnot": "structprune.solvers.elements.dsnot:DSNOT",
    },
)
"""What becomes of the weights that stay, and whether others are to."""

SHARINGS: Registry[Sharing] = Registry(
    "allocator of zeros",
    Sharing,
    {
        "uniform": "structprune.solvers.elements.shares:UNIFORM",
        "owl": "structprune.solvers.elements.shares:OWL",
        "dp": "structprune.solvers.elements.shares:DP",
    },
)
"""How the blocks share the zeros."""

__all__ = ["PRUNERS", "SHARINGS", "UPDATES", "Pruner", "Sharing", "Update"]
