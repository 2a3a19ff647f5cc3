"""Learners of gates: from gradients or losses, step by step, to the units that stay; numbers only, never a matrix.

Read first: `gate.py`, what a learner is given and what it does; then `graspprune.py`. Each other file is one learner.
"""

from structprune.allocation.gates.gate import GateLearner, GateProblem, Gates
from structprune.registry import Registry

__all__ = ["GATES", "NO_GATES", "GateLearner", "GateProblem", "Gates", "gates_of"]

NO_GATES = "none"
"""What a recipe says that has no learner."""

GATES: Registry[Gates] = Registry(
    "gate learner",
    Gates,
    {
        "graspprune": "structprune.allocation.gates.graspprune:GRASPPRUNE",
        "maskprune": "structprune.allocation.gates.maskprune:MASKPRUNE",
        "ddp": "structprune.allocation.gates.ddp:DDP",
        "bypass": "structprune.allocation.gates.bypass:BYPASS",
        "unipruning": "structprune.allocation.gates.unipruning:UNIPRUNING",
    },
    group="structprune.gates",
    reserved=[NO_GATES],
)
"""What `prune --gates` names."""


def gates_of(name: str) -> Gates | None:
    """Return the learner of this name; None where a recipe names none. Raises InputError for an unknown name."""
    return None if name == NO_GATES else GATES.get(name)
