"""Allocators: unit counts, costs and scores of all blocks -> how many units each block keeps."""

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
