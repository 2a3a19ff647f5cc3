"""Allocators: unit counts, costs and scores of all blocks -> how many units each block keeps."""

from collections.abc import Callable, Sequence

from structprune.allocation.uniform import BlockBudget
from structprune.registry import Registry

Allocator = Callable[[Sequence[BlockBudget], float, int], list[int]]

ALLOCATORS: Registry[Allocator] = Registry("allocator", {"uniform": "structprune.allocation.uniform:uniform"})
