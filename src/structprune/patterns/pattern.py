"""What a pattern is: how many weights of a matrix stay, and which, if every weight has a score.

Shape suffixes: O outputs, I inputs, B inputs of one block of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Numbers of a few rows that are looked at together, and of a sample; steps between those of a sample.
_PART_NUMBERS, _SAMPLED = 2**18, 8192
# What share of all numbers may be near.
_NEAR = 8
_STEPS = (1, 3, 7, 13, 29, 61, 127, 251, 509, 1021, 4093, 16381, 65521)


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
    def by_rows(self) -> bool:
        """Whether what stays of a row does not depend on the others."""
        ...

    @property
    def runs_faster(self) -> str:
        """Where such zeros make anything faster, a sentence."""
        ...

    def check(self, num_inputs: int, where: str) -> None:
        """Raise InputError where rows of so many weights cannot have this pattern."""
        ...

    def keep_largest(self, score_OI: Tensor) -> Tensor:
        """Choose the weights of the largest scores, whatever their sign: a bool mask (O, I).

        Of equal ones the lower index stays.
        """
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
    """Set the weights that go to +0.0: a product with the mask alone leaves -0.0, which kernels have stumbled over."""
    # Ten times as fast as a choice between two tensors; -0.0 + 0.0 is +0.0.
    return (weight_OI * keep_OI).add_(0.0)


def keep_in_rows(score_OI: Tensor, num_keep: int) -> Tensor:
    """Keep the `num_keep` largest scores of each row; of equal ones the lower index stays."""
    outputs, inputs = score_OI.shape
    keep_OI = torch.zeros(outputs, inputs, dtype=torch.bool, device=score_OI.device)
    if num_keep <= 0:
        return keep_OI
    for part in _parts(outputs, inputs):
        score_SI = score_OI[part].abs()
        least_S1 = score_SI.kthvalue(inputs - num_keep + 1, dim=1, keepdim=True).values
        torch.ge(score_SI, least_S1, out=keep_OI[part])
        # Rows where several are equal to the last one that stays.
        tied = (keep_OI[part].sum(dim=1) != num_keep).nonzero().flatten()
        order_TK = score_SI[tied].sort(dim=-1, descending=True, stable=True).indices[:, :num_keep]
        kept_TI = torch.zeros(len(tied), inputs, dtype=torch.bool, device=score_OI.device)
        keep_OI[tied + part.start] = kept_TI.scatter_(1, order_TK, value=True)
    return keep_OI


def keep_of_all(score_OI: Tensor, num_keep: int) -> Tensor:
    """Keep the `num_keep` largest of all scores, as float32 knows them; of equal ones the lower index stays.

    A sample says where the last one that stays is about, and one pass finds it among the few that are near. Where the
    sample is wrong, or many are equal, its bits are counted. No copy of the matrix is made.
    """
    outputs, inputs = score_OI.shape
    keep_OI = torch.zeros(outputs, inputs, dtype=torch.bool, device=score_OI.device)
    if num_keep <= 0:
        return keep_OI
    parts = _parts(outputs, inputs)
    least = _last_kept(score_OI, parts, num_keep)
    num_kept = 0
    for part in parts:
        size_SI = score_OI[part].to(torch.float32).abs()
        torch.ge(size_SI, least, out=keep_OI[part])
        num_kept += int(keep_OI[part].count_nonzero())
    too_many = num_kept - num_keep
    for part in reversed(parts) if too_many else ():
        # Of the equal ones the last go, row after row from the end.
        equal = (score_OI[part].to(torch.float32).abs() == least).flatten().nonzero().flatten()
        gone = equal[max(0, len(equal) - too_many) :]
        keep_OI[part].view(-1)[gone] = False
        too_many -= len(gone)
    return keep_OI


def _parts(outputs: int, inputs: int) -> list[slice]:
    """Return rows a few at a time, so that what is made of them stays near the processor."""
    step = max(1, _PART_NUMBERS // max(1, inputs))
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]


def _last_kept(score_OI: Tensor, parts: Sequence[slice], num_keep: int) -> float:
    """Find the `num_keep`-th largest score."""
    low, high = _bracket(score_OI, num_keep)
    near: list[Tensor] = []
    above = count = 0
    for part in parts:
        size_SI = score_OI[part].to(torch.float32).abs()
        larger_SI = size_SI > high
        above += int(larger_SI.count_nonzero())
        near.append(size_SI[(size_SI >= low).logical_xor_(larger_SI)])
        count += len(near[-1])
        if above >= num_keep or count > score_OI.numel() // _NEAR:
            return _by_bits(score_OI, parts, num_keep)
    if above + count < num_keep:
        return _by_bits(score_OI, parts, num_keep)
    return float(torch.cat(near).kthvalue(above + count - num_keep + 1).values)


def _bracket(score_OI: Tensor, num_keep: int) -> tuple[float, float]:
    """Return between what two sizes the last one that stays is, judged by a sample."""
    flat = score_OI.flatten() if score_OI.is_contiguous() else score_OI.T.flatten()
    # A prime step meets all columns.
    step = next(prime for prime in _STEPS if prime * _SAMPLED >= len(flat) or prime == _STEPS[-1])
    sample = flat[::step].to(torch.float32).abs().sort(descending=True).values
    place = num_keep / score_OI.numel() * len(sample)
    away = 4 * math.sqrt(place * max(0.0, 1 - place / len(sample))) + 2
    first, last = int(place - away), int(place + away)
    return (
        float(sample[last]) if last < len(sample) else 0.0,
        float(sample[first]) if first >= 0 else math.inf,
    )


def _by_bits(score_OI: Tensor, parts: Sequence[slice], num_keep: int) -> float:
    """Find the `num_keep`-th largest score by counting bits, whose order is that of positive float32 numbers."""
    high, above = _bin_of(_counts(score_OI, parts, None), num_keep)
    low, _ = _bin_of(_counts(score_OI, parts, high), num_keep - above)
    return float(torch.tensor((high << 16) | low, dtype=torch.int32).view(torch.float32))


def _counts(score_OI: Tensor, parts: Sequence[slice], high: int | None) -> Tensor:
    """Count the upper 16 bits of all numbers, or the lower ones of those that begin with `high`."""
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=score_OI.device)
    for part in parts:
        bits_SI = score_OI[part].to(torch.float32).abs().view(torch.int32)
        upper = bits_SI >> 16
        chosen = upper.flatten() if high is None else bits_SI[upper == high] & 0xFFFF
        counts += torch.bincount(chosen, minlength=1 << 16)
    return counts


def _bin_of(counts: Tensor, num_keep: int) -> tuple[int, int]:
    """Find the bin that holds the `num_keep`-th largest number, and how many numbers are in the bins above it."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, num_keep))
    above = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, above
