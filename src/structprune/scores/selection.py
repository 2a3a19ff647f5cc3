"""Which units stay: the best by a score, or what greedy removal with exact updates leaves, exchanges after it or not.

Shape suffixes: U units, O outputs, I inputs, M metric outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structprune.linalg.damped import damped_cholesky
from structprune.linalg.obs import RemovalPath, greedy_removal, metric_root, swap_units
from structprune.types import LayerProblem

# Units that leave together in greedy removal, as a share of all: 128 steps for the whole width.
_STEP_SHARE = 128


def keep_best(score_U: Tensor, num_keep: int) -> Tensor:
    """Mask of the `num_keep` highest scores, shape (U,); ties keep the unit with the lower number."""
    keep_U = torch.zeros(len(score_U), dtype=torch.bool)
    keep_U[torch.sort(score_U, descending=True, stable=True).indices[:num_keep]] = True
    return keep_U


def removal_path(problem: LayerProblem, num_remove: int) -> RemovalPath:
    """Order of removal by greedy OBS and what each removal adds, per token.

    With a sensitivity F the cost is the second-order increase of the summed loss per token, 1/2 tr(F D H D^T); without
    it, half the squared output error per token. The start is the ridge solution on all inputs, so the dense-path
    target is followed from the first removal on. The metric changes which units leave; it does not change the
    least-squares weight of those that stay, because every output row is free.
    """
    path = _greedy_path(problem, num_remove, *_objective(problem)[:2])
    return RemovalPath(order=path.order, cost=path.cost / problem.num_tokens)


def keep_greedy(problem: LayerProblem, num_keep: int) -> Tensor:
    """Mask of the units that greedy removal leaves, shape (U,)."""
    keep_U = torch.ones(problem.num_units, dtype=torch.bool)
    keep_U[removal_path(problem, problem.num_units - num_keep).order] = False
    return keep_U


def keep_swapped(problem: LayerProblem, num_keep: int) -> Tensor:
    """Mask of the units that are left after greedy removal and exchanges that lower its objective, shape (U,)."""
    weight_MI, inverse_II, delta = _objective(problem)
    keep_U = torch.ones(problem.num_units, dtype=torch.bool)
    keep_U[_greedy_path(problem, problem.num_units - num_keep, weight_MI, inverse_II).order] = False
    # The exchanges hold two matrices of this size; the inverse would be a third.
    del inverse_II
    gram_II = problem.gram_II.to(torch.float64, copy=True)
    gram_II.diagonal().add_(delta)
    return swap_units(weight_MI, gram_II, keep_U, width=problem.width).keep_U


def _objective(problem: LayerProblem) -> tuple[Tensor, Tensor, float]:
    """W and H^-1 of 1/2 tr((V - W) H (V - W)^T), and the ridge in H, all in float64.

    W is the ridge solution on all inputs, times the root of the damped sensitivity where there is one.
    """
    factor = damped_cholesky(problem.gram_II, problem.damping, "greedy removal")
    inverse_II = torch.cholesky_inverse(factor.factor_NN)
    weight_OI = problem.weight_OI.to(torch.float64)
    if problem.target_OI is not None:
        residual_OI = problem.target_OI.to(torch.float64) - weight_OI @ problem.gram_II.to(torch.float64)
        weight_OI = weight_OI + residual_OI @ inverse_II
    if problem.sensitivity_OO is not None:
        weight_OI = metric_root(problem.sensitivity_OO).T @ weight_OI
    return weight_OI, inverse_II, factor.delta


def _greedy_path(problem: LayerProblem, num_remove: int, weight_MI: Tensor, inverse_II: Tensor) -> RemovalPath:
    step = max(1, problem.num_units // _STEP_SHARE)
    return greedy_removal(weight_MI, inverse_II, num_remove, width=problem.width, units_per_step=step)
