"""Allocators: from unit counts, costs and scores of all blocks to the number of units that each block keeps.

Read first: `budget.py`, what an allocator sees and how counts are rounded; then `uniform.py` and `across.py`.
"""

from collections.abc import Callable, Sequence

from structprune.allocation.budget import AllocationOptions, BlockBudget
from structprune.registry import Registry

Allocator = Callable[[Sequence[BlockBudget], AllocationOptions], list[int]]

ALLOCATORS: Registry[Allocator] = Registry(
    "allocator",
    {
        "uniform": "structprune.allocation.uniform:uniform",
        "closed-form": "structprune.allocation.across:closed_form",
        "energy": "structprune.allocation.across:energy",
        "standardised": "structprune.allocation.across:standardised",
        "softmax": "structprune.allocation.across:softmax",
    },
)
