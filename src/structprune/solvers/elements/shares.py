"""How the blocks of a model share the zeros, where no pattern says it: from one number of each block, or by the loss.

Shape suffixes: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.solvers.elements.unit import row_groups

# OWL: a weight is an outlier whose score is so many times the mean of its block, and how far shares may be apart.
_OUTLIER, _REACH = 5.0, 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMap:
    """One linear map in the dense model."""

    weight_OI: Tensor
    energy_I: Tensor
    """Sum of the squares of each input, float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """One way to share the zeros out."""

    measure: Callable[[Sequence[MeasuredMap]], float] | None
    """The number of one block, from its maps in the dense model; None: nothing is measured."""
    shares: Callable[[Sequence[float], Sequence[int], float], list[float]]
    """(numbers of all blocks, how many weights each has in scope, share of all) -> share of each."""
    reach: float = 0.0
    """How far from the whole's share one of a block may be."""
    by_loss: bool = False
    """Whether every map has a share of its own, such that all together add least to the loss by what shares of each
    are measured to add; the other fields are not asked then, but for the reach."""


def outlier_share(maps: Sequence[MeasuredMap]) -> float:
    """Compute what share of a block's weights has a score |w| |x| of five times the mean or more (OWL, section 3.2)."""
    scores = [(each, row_groups(*each.weight_OI.shape)) for each in maps]
    total = sum(float(_score(each, part).sum(dtype=torch.float64)) for each, parts in scores for part in parts)
    count = sum(each.weight_OI.numel() for each in maps)
    least = _OUTLIER * total / max(1, count)
    found = sum(int((_score(each, part) > least).count_nonzero()) for each, parts in scores for part in parts)
    return found / max(1, count)


def _score(measured: MeasuredMap, part: slice) -> Tensor:
    return measured.weight_OI[part].float().abs() * measured.energy_I.sqrt().float()


def owl_shares(outliers: Sequence[float], weights: Sequence[int], share: float) -> list[float]:
    """Keep more where there are more outliers: densities in proportion, 0.16 apart (OWL, arXiv 2310.05175).

    As in public code the densities are then moved so that their mean is that of the whole; here the mean over weights.
    """
    span = max(outliers) - min(outliers)
    if span <= 0:
        return [share] * len(outliers)
    more = [2 * _REACH * (each - min(outliers)) / span for each in outliers]
    mean = sum(part * count for part, count in zip(more, weights, strict=True)) / sum(weights)
    return [share - part + mean for part in more]


def equal_shares(numbers: Sequence[float], weights: Sequence[int], share: float) -> list[float]:
    """Take the same share of every block."""
    return [share] * len(weights)


# How far the share of a map may be from the whole's, by the loss.
_LOSS_REACH = 0.15

UNIFORM = Sharing(measure=None, shares=equal_shares)
OWL = Sharing(measure=outlier_share, shares=owl_shares, reach=2 * _REACH)
DP = Sharing(measure=None, shares=equal_shares, reach=_LOSS_REACH, by_loss=True)
