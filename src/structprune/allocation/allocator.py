"""What an allocator is: the function, what it compares blocks by, and what it holds itself to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from structprune.allocation.budget import AllocationOptions, BlockBudget
from structprune.registry import check_installed


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocator:
    """A choice of how many units each block keeps."""

    allocate: Callable[[Sequence[BlockBudget], AllocationOptions], list[int]]
    """(unit groups of all blocks, settings) -> units to keep of each."""
    compares: Literal["none", "scores", "loss"]
    """What it reads of each unit as `cost_U`: nothing, its score, or what its removal adds to the loss."""
    even: bool = False
    """Whether blocks of one width keep one width, so that a config without entries per block describes the result. Such
    an allocator removes no sublayer."""
    bounded: bool = True
    """Whether it holds each group between the least and the largest share of its units that the settings name."""
    holds_several: bool = False
    """Whether it holds several sums to their limits (`AllocationOptions.further`)."""
    weighs_widths: bool = False
    """Whether it asks what each width adds to a limited sum, so that the sum need not grow evenly with the units."""
    reads_widths: bool = False
    """Whether the widths are decided outside, and the sparsity is what they make of it."""
    has_temperature: bool = False
    """Whether `AllocationOptions.temperature` changes what it does."""
    packages: tuple[str, ...] = ()
    """Modules that it imports beside the dependencies of structprune."""
    extra: str = ""
    """What is installed to have them: `structprune[milp]`."""

    def check(self, name: str) -> None:
        """Raise UnsupportedError if a package that it needs is not installed."""
        check_installed(f"allocator {name!r}", self.packages, self.extra)
