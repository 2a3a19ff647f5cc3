"""Damped Cholesky: the one place where a Gram matrix is made definite.

Shape suffixes: N order of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.errors import NumericalError

_MAX_RAISES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class DampedCholesky:
    """Lower factor of G + delta I, and the damping it really took."""

    factor_NN: Tensor
    delta: float
    """Absolute ridge."""
    damping: float
    """Ridge as a share of the mean diagonal of G."""
    num_raises: int


def damped_cholesky(gram_NN: Tensor, damping: float, where: str) -> DampedCholesky:
    """Factor G + delta I in float64, delta = damping * mean(diag G), ten times more at each failed attempt.

    At most six raises, each counted; a Gram of zeros gets delta = damping. Raises NumericalError after the last.
    """
    gram_NN = gram_NN.to(torch.float64)
    mean = float(gram_NN.diagonal().mean()) or 1.0
    for num_raises in range(_MAX_RAISES + 1):
        share = damping * 10.0**num_raises
        shifted = gram_NN.clone()
        shifted.diagonal().add_(share * mean)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all()):
            return DampedCholesky(factor_NN=factor, delta=share * mean, damping=share, num_raises=num_raises)
    raise NumericalError(
        "the Gram matrix stays indefinite",
        where=where,
        got=f"damping up to {damping * 10.0**_MAX_RAISES:g} of the mean diagonal",
        do="use more calibration tokens, or raise damping in the recipe",
    )


def target_error(weight_OI: Tensor, gram_II: Tensor, cross_OI: Tensor, energy: float) -> float:
    """sum_t |V x - y|^2 from G, C = sum y x^T and sum |y|^2, in float64; never below zero."""
    weight_OI = weight_OI.to(torch.float64)
    product_OI = weight_OI @ gram_II.to(torch.float64) - 2.0 * cross_OI.to(torch.float64)
    return max(0.0, energy + float((product_OI * weight_OI).sum()))
