"""DSnoT: weights that went come back, and others go, while a row's expected error falls (arXiv 2310.08915).

With m_i and v_i mean and variance of input i, the expected error of a row is e = sum over what went of w_i m_i. What
comes back is the weight that went with the largest sign(e) w_i m_i / v_i (equation 6), what goes instead is of the
weights that stay with sign(e) w_i m_i < 0 the one of the least Wanda score (equation 7); in groups of N:M both are of
one group. Rows keep their counts, and the others' weights stay as they are.

Published code stops at |e| < 0.1, e a sum over tokens, which is another thing for every model. Here a row stops when
an exchange would not lower |e|, and at the published 50. An input that never varies counts as one of the least
variance that there is.

Shape suffixes: I inputs, O outputs, S some of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structprune.patterns import sparse
from structprune.solvers.elements.problem import SparseProblem, SparseSolution, Update
from structprune.solvers.elements.unit import group_bytes, row_groups, working_dtype

_MOST = 50


def regrown_rows(
    weight_SI: Tensor, keep_SI: Tensor, mean_I: Tensor, variance_I: Tensor, norm_I: Tensor, group: int
) -> Tensor:
    """Exchange weights of some rows, within groups of so many inputs (1: anywhere): the new mask."""
    keep_SI, gain_SI = keep_SI.clone(), weight_SI * mean_I
    grow_SI, score_SI = gain_SI / variance_I, weight_SI.abs() * norm_I
    place_I = torch.arange(weight_SI.shape[1], device=weight_SI.device) // group
    error_S = (gain_SI * ~keep_SI).sum(dim=1)
    rows = torch.arange(len(weight_SI), device=weight_SI.device)
    for _ in range(_MOST):
        sign_R1, kept_RI = error_S[rows].sign()[:, None], keep_SI[rows]
        may_go_RI, may_return_RI = kept_RI & (sign_R1 * gain_SI[rows] < 0), ~kept_RI
        if group > 1:
            # Into groups that something may leave.
            left_RG = may_go_RI.view(len(rows), -1, group).any(dim=2)
            may_return_RI &= left_RG.repeat_interleave(group, dim=1)
        back_R = (sign_R1 * grow_SI[rows]).masked_fill_(~may_return_RI, -torch.inf).argmax(dim=1)
        if group > 1:
            may_go_RI &= place_I == place_I[back_R][:, None]
        least_R, gone_R = score_SI[rows].masked_fill_(~may_go_RI, torch.inf).min(dim=1)
        error_R = error_S[rows] - gain_SI[rows, back_R] + gain_SI[rows, gone_R]
        better_R = torch.isfinite(least_R) & ~keep_SI[rows, back_R] & (error_R.abs() < error_S[rows].abs())
        rows, back_R, gone_R = rows[better_R], back_R[better_R], gone_R[better_R]
        if not len(rows):
            break
        keep_SI[rows, back_R] = True
        keep_SI[rows, gone_R] = False
        error_S[rows] = error_R[better_R]
    return keep_SI


def regrow(problem: SparseProblem, solution: SparseSolution) -> SparseSolution:
    """Exchange weights, and go back to those of the dense model."""
    moments, dtype = problem.moments, working_dtype(problem)
    assert moments.sum_I is not None, "means are summed for it"
    mean_I = moments.sum_I.to(torch.float64) / max(1, moments.num_tokens)
    energy_I = moments.gram_II.diagonal().to(torch.float64) / max(1, moments.num_tokens)
    variance_I = (energy_I - mean_I.square()).clamp_(min=0)
    # Less than rounding leaves of two equal numbers says nothing.
    variance_I = variance_I.clamp(min=max(float(energy_I.max()) * torch.finfo(torch.float32).eps, 1e-30))
    mean_I, variance_I, norm_I = mean_I.to(dtype), (variance_I / variance_I.max()).to(dtype), energy_I.sqrt().to(dtype)
    keep_OI = torch.empty_like(solution.keep_OI, memory_format=torch.contiguous_format)
    for part in row_groups(*keep_OI.shape):
        weight_SI = problem.weight_OI[part].to(dtype)
        kept_SI = solution.keep_OI[part]
        keep_OI[part] = regrown_rows(weight_SI, kept_SI, mean_I, variance_I, norm_I, problem.pattern.group)
    weight_OI = sparse(problem.weight_OI.to(dtype), keep_OI)
    return SparseSolution(weight_OI=weight_OI, keep_OI=keep_OI, status=solution.status)


def workspace(inputs: int, outputs: int) -> int:
    """Count the mask, the weight and its answer, and of some rows eight of their size: bytes."""
    return inputs * outputs * (4 + 4 + 1) + group_bytes(inputs, outputs, 8)


DSNOT = Update(solve=regrow, reads=frozenset({"energy", "mean"}), workspace=workspace)
