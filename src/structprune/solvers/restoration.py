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
    """min over V of sum_t |V x_K - y|^2 + delta |V - W_K|^2, solved in float64.

    V = W_K + (C_K - W_K G_KK) (G_KK + delta I)^-1 with C = sum y x^T. For the local target y = W x this is the
    restoration of FASP (arXiv 2501.09412), W_K + W_P G_PK (G_KK + delta I)^-1, with the ridge drawn toward the original
    weight instead of zero. delta = damping * mean(diag G_KK); raised dampings are in the statistics.
    """
    kept_K = problem.kept_inputs(keep_U)
    if problem.target_OI is None and len(kept_K) == problem.weight_OI.shape[1]:
        return SolveResult(weight_OK=problem.weight_OI, status="ok", statistics={})
    gram_KK = problem.gram_II[kept_K][:, kept_K].to(torch.float64)
    factor = damped_cholesky(gram_KK, problem.damping, "least squares")
    weight_OK = problem.weight_OI[:, kept_K].to(torch.float64)
    if problem.target_OI is None:
        removed_P = problem.kept_inputs(~keep_U)
        gram_PK = problem.gram_II[removed_P][:, kept_K].to(torch.float64)
        residual_OK = problem.weight_OI[:, removed_P].to(torch.float64) @ gram_PK
    else:
        residual_OK = problem.target_OI[:, kept_K].to(torch.float64) - weight_OK @ gram_KK
    update_KO = torch.cholesky_solve(residual_OK.T, factor.factor_NN)
    return SolveResult(
        weight_OK=(weight_OK + update_KO.T).to(problem.weight_OI.dtype),
        status="damping-raised" if factor.num_raises else "ok",
        statistics={"damping": factor.damping, "damping_raises": float(factor.num_raises)},
    )
