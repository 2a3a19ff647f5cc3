"""Damped Cholesky: the one place where a Gram matrix is made definite.

Factors, solutions and inverses lie where the matrix lay: a Gram of order 28,672 takes 6.1 GiB in float64, once.
Shape suffixes: N order of the matrix, M right sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.errors import NumericalError

_MAX_RAISES = 6
# Of the mean: what an input without energy counts as where each has its own ridge.
_LEAST_ENERGY = 1e-12
# Inputs of a block, and rows of a strip of what is left, of an inverse's factor.
_BLOCK, _STRIP = 128, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class DampedCholesky:
    """Lower factor of G + delta I, or the other one that was asked for, and the damping it really took."""

    factor_NN: Tensor
    delta: float
    """Absolute ridge, in the mean where every input has its own."""
    damping: float
    """Ridge as a share of the mean diagonal of G, or of each input's own."""
    num_raises: int


def damped_cholesky(
    gram_NN: Tensor | Callable[[], Tensor],
    damping: float,
    where: str,
    factor: Callable[[Tensor], tuple[Tensor, bool]] | None = None,
    own: bool = False,
) -> DampedCholesky:
    """Factor G + delta I in float64, delta = damping * mean(diag G), ten times more at each failed attempt.

    With `own` it is G + damping * diag(G): each input's ridge is a share of its own energy, so that one with the energy
    of thousands puts nothing on the others.

    G is a matrix, which is copied, or what makes a new one in float64, which is overwritten: asked once per attempt.
    `factor` is `factored`, or `inverse_factored`.
    At most six raises, each counted; a Gram of zeros gets delta = damping. Raises NumericalError after the last.
    """
    for num_raises in range(_MAX_RAISES + 1):
        shifted_NN = gram_NN.to(torch.float64, copy=True) if isinstance(gram_NN, Tensor) else gram_NN()
        share = damping * 10.0**num_raises
        diagonal_N = shifted_NN.diagonal()
        mean = float(diagonal_N.mean()) or 1.0
        delta = share * mean
        if own:
            # Inputs without energy get next to nothing.
            diagonal_N.add_(diagonal_N.clamp_min(_LEAST_ENERGY * mean), alpha=share)
        else:
            diagonal_N.add_(delta)
        factor_NN, definite = (factor or factored)(shifted_NN)
        if definite:
            return DampedCholesky(factor_NN=factor_NN, delta=delta, damping=share, num_raises=num_raises)
        # The next attempt makes its own.
        del shifted_NN, factor_NN
    raise NumericalError(
        "the Gram matrix stays indefinite",
        where=where,
        got=f"damping up to {damping * 10.0**_MAX_RAISES:g} of the mean diagonal",
        do="use more calibration tokens, or raise damping in the recipe",
    )


def factored(matrix_NN: Tensor) -> tuple[Tensor, bool]:
    """Factor a symmetric float64 matrix, which is overwritten: (lower Cholesky factor, whether there is one)."""
    # Symmetric, so its transpose is itself, in the layout that LAPACK factors in place.
    factor_NN = matrix_NN.T
    info = torch.empty((), dtype=torch.int32, device=matrix_NN.device)
    torch.linalg.cholesky_ex(factor_NN, out=(factor_NN, info))
    return factor_NN, int(info) == 0 and bool(torch.isfinite(factor_NN.diagonal()).all())


def solved(factor_NN: Tensor, right_MN: Tensor) -> Tensor:
    """Solve X L L^T = B for X, (M, N); the rows of the float64 right side B are overwritten."""
    right_NM = right_MN.T
    torch.linalg.solve_triangular(factor_NN, right_NM, upper=False, out=right_NM)
    torch.linalg.solve_triangular(factor_NN.T, right_NM, upper=True, out=right_NM)
    return right_MN


def inverted(factor_NN: Tensor) -> Tensor:
    """Compute (L L^T)^-1, symmetric; the factor is overwritten."""
    torch.cholesky_inverse(factor_NN, out=factor_NN)
    return factor_NN.T


def inverse_factored(matrix_NN: Tensor) -> tuple[Tensor, bool]:
    """Compute U upper with H^-1 = U^T U in the place of H, symmetric and contiguous: (U, whether H is definite).

    H = R R^T with R upper, from the last block of inputs to the first, and U = R^-1: half the work of a factor, the
    inverse and the factor of that, nearly all of it in products.
    """
    order = len(matrix_NN)
    blocks = [slice(start, min(start + _BLOCK, order)) for start in range(0, order, _BLOCK)]
    for own in reversed(blocks):
        lower_BB, info = torch.linalg.cholesky_ex(matrix_NN[own, own].flip(0, 1))
        if int(info) or not bool(torch.isfinite(lower_BB.diagonal()).all()):
            return matrix_NN, False
        identity_BB = torch.eye(len(lower_BB), dtype=matrix_NN.dtype, device=matrix_NN.device)
        inverse_BB = torch.linalg.solve_triangular(lower_BB.flip(0, 1), identity_BB, upper=True)
        matrix_NN[own, own] = inverse_BB
        matrix_NN[own, : own.start] = 0
        # Of R what is above the block; the rest loses its square, of which the upper half is enough.
        above_AB = matrix_NN[: own.start, own] @ inverse_BB.T
        matrix_NN[: own.start, own] = above_AB
        for start in range(0, own.start, _STRIP):
            rest_SA = matrix_NN[start : min(start + _STRIP, own.start), start : own.start]
            rest_SA.addmm_(above_AB[start : start + _STRIP], above_AB[start:].T, alpha=-1)
    for own in blocks[1:]:
        above_AB = matrix_NN[: own.start, own] @ matrix_NN[own, own]
        for start in range(0, own.start, _STRIP):
            stop = min(start + _STRIP, own.start)
            matrix_NN[start:stop, own].addmm_(
                matrix_NN[start:stop, start : own.start], above_AB[start:], beta=0, alpha=-1
            )
    return matrix_NN, True
