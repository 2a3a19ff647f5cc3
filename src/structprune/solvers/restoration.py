"""Consumer weights on the kept inputs: cut, or re-solved by least squares.

Shape suffixes: O outputs, I inputs, K kept inputs, P removed inputs, U units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structprune.linalg.damped import damped_cholesky
from structprune.types import LayerProblem, SolveResult


def mask_only(problem: LayerProblem, keep_U: Tensor) -> SolveResult:
    """Drop the removed columns and leave the others as they are."""
    kept_K = problem.kept_inputs(keep_U)
    return SolveResult(weight_OK=problem.weight_OI[:, kept_K], status="ok", statistics={})


def least_squares(problem: LayerProblem, keep_U: Tensor) -> SolveResult:
    """min_V sum_t |V x_K - W x|^2 + delta |V - W_K|^2, solved in float64.

    V = W_K + W_P G_PK (G_KK + delta I)^-1: the restoration of FASP (arXiv 2501.09412) with the ridge drawn toward
    the original weight instead of zero. delta = damping * mean(diag G_KK); raised dampings are in the statistics.
    """
    kept_K = problem.kept_inputs(keep_U)
    removed_P = problem.kept_inputs(~keep_U)
    weight_OI = problem.weight_OI.to(torch.float64)
    if len(removed_P) == 0:
        return SolveResult(weight_OK=problem.weight_OI, status="ok", statistics={})
    factor = damped_cholesky(problem.gram_II[kept_K][:, kept_K], problem.damping, "least squares")
    target_KO = problem.gram_II[kept_K][:, removed_P].to(torch.float64) @ weight_OI[:, removed_P].T
    update_KO = torch.cholesky_solve(target_KO, factor.factor_NN)
    return SolveResult(
        weight_OK=(weight_OI[:, kept_K] + update_KO.T).to(problem.weight_OI.dtype),
        status="damping-raised" if factor.num_raises else "ok",
        statistics={"damping": factor.damping, "damping_raises": float(factor.num_raises)},
    )
