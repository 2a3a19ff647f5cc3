"""What a pattern is: how many weights of a matrix stay, and which, if every weight has a score.

Shape suffixes: O outputs, I inputs, B inputs of one block of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Pattern(Protocol):
    """A set of masks of one matrix (outputs, inputs)."""

    @property
    def share(self) -> float:
        """The share of zeros."""
        ...

    @property
    def name(self) -> str:
        """The pattern as the command line writes it."""
        ...

    @property
    def group(self) -> int:
        """How many consecutive inputs of one row are decided together; 1: blocks of inputs may end anywhere."""
        ...

    @property
    def runs_faster(self) -> str:
        """Where such zeros make anything faster, a sentence."""
        ...

    def check(self, num_inputs: int, where: str) -> None:
        """Raise InputError where rows of so many weights cannot have this pattern."""
        ...

    def keep_largest(self, score_OI: Tensor) -> Tensor:
        """Choose the weights of the largest scores: a bool mask (O, I). Of equal ones the lower index stays."""
        ...

    def remove_in_block(self, score_OB: Tensor, start: int) -> Tensor:
        """Choose what goes of the block of inputs from `start`, (O, B), so that every block loses its own share.

        Over all blocks in turn exactly as many go as `keep_largest` removes of a matrix.
        """
        ...

    def remove_of_rest(self, score_OR: Tensor, removed_O: Tensor, num_inputs: int) -> Tensor:
        """Choose what goes of the last inputs, (O, R) of `num_inputs`, where `removed_O` of each row went already."""
        ...

    def matches(self, weight_OI: Tensor) -> bool:
        """Whether a weight has at least as many zeros, in the places where the pattern wants them."""
        ...


def sparse(weight_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """Set the weights that go to +0.0: a product with the mask would leave -0.0, which kernels have stumbled over."""
    return torch.where(keep_OI, weight_OI, torch.zeros((), dtype=weight_OI.dtype, device=weight_OI.device))


def keep_in_rows(score_OI: Tensor, num_keep: int) -> Tensor:
    """Keep the `num_keep` largest scores of each row; of equal ones the lower index stays."""
    order_OK = score_OI.sort(dim=-1, descending=True, stable=True).indices[:, :num_keep]
    return torch.zeros_like(score_OI, dtype=torch.bool).scatter_(1, order_OK, value=True)


def keep_of_all(score_OI: Tensor, num_keep: int) -> Tensor:
    """Keep the `num_keep` largest of all scores, which are not negative; of equal ones the lower index stays.

    The order of such float32 numbers is that of their bits, so two counts of 16 bits each find the last one that stays:
    no copy of the matrix is sorted.
    """
    bits_OI = score_OI.to(torch.float32).clamp(min=0).contiguous().view(torch.int32)
    if num_keep <= 0:
        return torch.zeros_like(bits_OI, dtype=torch.bool)
    high, above = _bin_of(_counts(bits_OI, None), num_keep)
    low, above_low = _bin_of(_counts(bits_OI, high), num_keep - above)
    threshold = (high << 16) | low
    keep_OI = bits_OI > threshold
    # Of the equal ones the first few, row after row.
    equal = (bits_OI == threshold).flatten().nonzero().flatten()[: num_keep - above - above_low]
    keep_OI.view(-1)[equal] = True
    return keep_OI


def _counts(bits_OI: Tensor, high: int | None) -> Tensor:
    """Count the upper 16 bits of all numbers, or the lower ones of those that begin with `high`."""
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=bits_OI.device)
    for part_SI in bits_OI.split(max(1, (1 << 20) // max(1, bits_OI.shape[1]))):
        upper = part_SI >> 16
        chosen = upper.flatten() if high is None else part_SI[upper == high] & 0xFFFF
        counts += torch.bincount(chosen, minlength=1 << 16)
    return counts


def _bin_of(counts: Tensor, num_keep: int) -> tuple[int, int]:
    """Find the bin that holds the `num_keep`-th largest number, and how many numbers are in the bins above it."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, num_keep))
    above = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, above
