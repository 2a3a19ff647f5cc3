"""The weight of one map on the inputs that stay, by least squares, each output with ridges of its own.

Shape suffixes: O outputs, I inputs, K kept inputs, P removed inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.linalg.cholesky import damped_cholesky, solved

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges that are tried on held-out examples, as shares of the Gram's mean diagonal."""
_RIDGE = 1e-2
"""The ridge where there are too few examples to choose it by."""
_NO_CORRECTION = -1


@dataclass(slots=True, kw_only=True)
class Sums:
    """Sums over some tokens of a map's inputs x and wanted outputs y, float64."""

    gram_II: Tensor
    """Sum of x x^T."""
    target_OI: Tensor
    """Sum of y x^T."""

    def __add__(self, other: Sums) -> Sums:
        """Add the sums over the tokens of both."""
        return Sums(gram_II=self.gram_II + other.gram_II, target_OI=self.target_OI + other.target_OI)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The answer of all sums, and the one that the held-out examples have not seen, (O, K) in float64."""

    weight_OK: Tensor
    judged_OK: Tensor | None
    """The same of the fitted sums alone; None where nothing is held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Corrections:
    """What is added to the kept columns of the old weight, a matrix (O, K) per ridge."""

    local: list[Tensor]
    """W_P G_PK (G_KK + delta I)^-1 makes up for the removed inputs."""
    path: list[Tensor]
    """(C - W G)_K (G_KK + delta I)^-1 makes up for what the layers before got wrong, with C the sum of y x^T."""


def least_squares_by_output(weight_OI: Tensor, keep_I: Tensor, fit: Sums, held_out: Sums | None) -> Solution:
    """Minimise sum |V x_K - y|^2 plus ridges toward the original weights over V, (O, K) in float64.

    The two corrections are those of `solvers/least_squares.py`. Outputs are solved apart, and here each one takes the
    pair of ridges, or no correction, that errs least on the held-out sums, before it is solved on all: in an encoder a
    few outputs are a hundred times as large as the others and depend on a few units, and where one of these has left,
    what is good for the others makes noise of them.
    """
    kept_K, removed_P = torch.nonzero(keep_I).flatten(), torch.nonzero(~keep_I).flatten()
    weight_OI = weight_OI.to(torch.float64)
    base_OK = weight_OI[:, kept_K]
    if held_out is None:
        only = _corrections(weight_OI, kept_K, removed_P, fit, (_RIDGE,))
        return Solution(weight_OK=base_OK + only.local[0] + only.path[0], judged_OK=None)
    tried = _corrections(weight_OI, kept_K, removed_P, fit, _RIDGES)
    local_O, path_O = _choose(base_OK, tried, held_out.gram_II[kept_K][:, kept_K], held_out.target_OI[:, kept_K])
    final = _corrections(weight_OI, kept_K, removed_P, fit + held_out, _RIDGES)
    return Solution(
        weight_OK=base_OK + _rows(final.local, local_O) + _rows(final.path, path_O),
        judged_OK=base_OK + _rows(tried.local, local_O) + _rows(tried.path, path_O),
    )


def _corrections(
    weight_OI: Tensor, kept_K: Tensor, removed_P: Tensor, sums: Sums, ridges: tuple[float, ...]
) -> _Corrections:
    gram_KK = sums.gram_II[kept_K][:, kept_K]
    local_OK = weight_OI[:, removed_P] @ sums.gram_II[removed_P][:, kept_K]
    path_OK = sums.target_OI[:, kept_K] - weight_OI @ sums.gram_II[:, kept_K]
    found = _Corrections(local=[], path=[])
    for ridge in ridges:
        factor = damped_cholesky(gram_KK, ridge, "least squares")
        found.local.append(solved(factor.factor_NN, local_OK.clone()))
        found.path.append(solved(factor.factor_NN, path_OK.clone()))
    return found


def _choose(base_OK: Tensor, tried: _Corrections, gram_KK: Tensor, target_OK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of the local and the path ridge of each output, `_NO_CORRECTION` for none.

    The squared error of v is v G v^T - 2 v c^T and what no weight changes. As v is a sum of three matrices, products
    with G are made once for each of them.
    """

    def linear(rows_OK: Tensor) -> Tensor:
        return (rows_OK * (base_OK @ gram_KK - target_OK)).sum(1) * 2

    def product(first_OK: Tensor, times_gram_OK: Tensor) -> Tensor:
        return (first_OK * times_gram_OK).sum(1)

    local_gram = [each @ gram_KK for each in tried.local]
    path_gram = [each @ gram_KK for each in tried.path]
    zero_O = torch.zeros(len(base_OK), dtype=torch.float64, device=base_OK.device)
    locals_O = [zero_O, *(linear(a) + product(a, g) for a, g in zip(tried.local, local_gram, strict=True))]
    paths_O = [zero_O, *(linear(a) + product(a, g) for a, g in zip(tried.path, path_gram, strict=True))]
    errors: list[Tensor] = []
    for number, local_O in enumerate(locals_O):
        for other, path_O in enumerate(paths_O):
            mixed_O = 2 * product(tried.path[other - 1], local_gram[number - 1]) if number and other else zero_O
            errors.append(local_O + path_O + mixed_O)
    best_O = torch.stack(errors).argmin(0)
    return best_O // len(paths_O) + _NO_CORRECTION, best_O % len(paths_O) + _NO_CORRECTION


def _rows(corrections: list[Tensor], chosen_O: Tensor) -> Tensor:
    """Take each output's row from the matrix of its ridge; zeros where it has none."""
    result_OK = torch.zeros_like(corrections[0])
    for number, correction_OK in enumerate(corrections):
        rows = chosen_O == number
        result_OK[rows] = correction_OK[rows]
    return result_OK
