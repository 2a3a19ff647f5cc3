"""Allocators: from unit counts, costs and scores of all blocks to the number of units that each block keeps.

Read first: `allocator.py`, then `budget.py`, what an allocator sees and how counts are rounded; then `across.py`. The
exact ones choose from a menu of widths (`menu.py`): `knapsack.py` and `mixed_integer.py`; `path.py` answers all sizes.
"""

from structprune.allocation.allocator import Allocator
from structprune.allocation.budget import AllocationOptions, BlockBudget
from structprune.registry import Registry

__all__ = ["ALLOCATORS", "AllocationOptions", "Allocator", "BlockBudget"]

ALLOCATORS: Registry[Allocator] = Registry(
    "allocator",
    Allocator,
    {
        "uniform": "structprune.allocation.uniform:UNIFORM",
        "closed-form": "structprune.allocation.across:CLOSED_FORM",
        "fermi-dirac": "structprune.allocation.across:FERMI_DIRAC",
        "standardised": "structprune.allocation.across:STANDARDISED",
        "softmax": "structprune.allocation.across:SOFTMAX",
        "dp": "structprune.allocation.knapsack:DP",
        "milp": "structprune.allocation.mixed_integer:MILP",
        "widths": "structprune.allocation.outside:WIDTHS",
    },
    group="structprune.allocators",
    aliases={"energy": "fermi-dirac"},
)
