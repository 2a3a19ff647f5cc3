"""Pruners that score every weight and leave the others as they are: magnitude, Wanda, RIA, UniPruning's average.

Shape suffixes: I inputs, O outputs, N windows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structprune.patterns import sparse
from structprune.solvers.elements.problem import Pruner, SparseProblem, SparseSolution

# UniPruning: share of each row and column that a sum is taken over, exponent of the mean square, weight of a window.
_SAMPLED, _UNI_EXPONENT, _UNI_RATE = 0.2, 0.35, 0.01
# RIA: exponent of an input's norm.
_RIA_EXPONENT = 0.5


def workspace(inputs: int, outputs: int) -> int:
    """Count the weight, its score, the sorted score with its order, masks: bytes."""
    return inputs * outputs * (4 + 4 + 12 + 2 + 4)


def magnitude_score(problem: SparseProblem) -> Tensor:
    """Compute |w|."""
    return problem.weight_OI.float().abs()


def wanda_score(problem: SparseProblem) -> Tensor:
    """Compute |w_oi| |x_i|, the norm over all tokens (arXiv 2306.11695, section 3)."""
    norm_I = problem.moments.gram_II.diagonal().to(torch.float64).sqrt()
    return problem.weight_OI.float().abs() * _scaled(norm_I)


def ria_score(problem: SparseProblem) -> Tensor:
    """Compute (|w| / its column's sum + |w| / its row's sum) |x_i|^(1/2) (Plug-and-Play, ICLR 2024, equation 4)."""
    return relative_importance(problem.weight_OI, problem.moments.gram_II.diagonal())


def relative_importance(weight_OI: Tensor, energy_I: Tensor) -> Tensor:
    """Compute RIA's score of a weight whose inputs have these sums of squares: a new matrix, float32."""
    weight_OI = weight_OI.float().abs()
    norm_I = energy_I.to(torch.float64).sqrt()
    relative_OI = weight_OI / _positive(weight_OI.sum(dim=0)) + weight_OI / _positive(weight_OI.sum(dim=1))[:, None]
    return relative_OI * _scaled(norm_I**_RIA_EXPONENT)


def uniprune_score(problem: SparseProblem) -> Tensor:
    """Average RIA's score over the windows, each with the sums of a fifth of every row and column, drawn at random.

    What UniPruning's published settings come to (arXiv 2510.03291): its threshold of 0.001 changes nothing, so that the
    mirror step is a moving average, and the weights that drift along are put back at the end.
    """
    assert problem.energy_NI is not None
    weight_OI = problem.weight_OI.float().abs()
    outputs, inputs = weight_OI.shape
    count = max(1, round(_SAMPLED * min(outputs, inputs)))
    generator = torch.Generator().manual_seed(problem.seed)
    average_OI = torch.zeros_like(weight_OI)
    for energy_I in problem.energy_NI:
        rows = torch.randperm(outputs, generator=generator)[:count].to(weight_OI.device)
        columns = torch.randperm(inputs, generator=generator)[:count].to(weight_OI.device)
        score_OI = weight_OI / _positive(weight_OI[rows].sum(dim=0))
        score_OI += weight_OI / _positive(weight_OI[:, columns].sum(dim=1))[:, None]
        score_OI *= energy_I.to(weight_OI.dtype) ** _UNI_EXPONENT
        average_OI.lerp_(score_OI / _positive(score_OI.mean()), _UNI_RATE)
    return average_OI


def _positive(x: Tensor) -> Tensor:
    """Replace zeros, which belong to weights of zero, by one."""
    return torch.where(x > 0, x, torch.ones_like(x))


def _scaled(norm_I: Tensor) -> Tensor:
    """Bring norms to float32 with a largest one of 1: the order of scores does not depend on their size."""
    return (norm_I / norm_I.max().clamp(min=torch.finfo(torch.float64).tiny)).float()


def _pruned_by(score: Callable[[SparseProblem], Tensor]) -> Callable[[SparseProblem], SparseSolution]:
    def prune(problem: SparseProblem) -> SparseSolution:
        keep_OI = problem.pattern.keep_largest(score(problem))
        dtype = torch.promote_types(problem.weight_OI.dtype, torch.float32)
        return SparseSolution(weight_OI=sparse(problem.weight_OI.to(dtype), keep_OI), keep_OI=keep_OI)

    return prune


MAGNITUDE = Pruner(prune=_pruned_by(magnitude_score), reads=frozenset(), workspace=workspace)
WANDA = Pruner(prune=_pruned_by(wanda_score), reads=frozenset({"energy"}), workspace=workspace)
RIA = Pruner(prune=_pruned_by(ria_score), reads=frozenset({"energy"}), workspace=workspace)
UNIPRUNE = Pruner(prune=_pruned_by(uniprune_score), reads=frozenset({"energy"}), workspace=workspace)
