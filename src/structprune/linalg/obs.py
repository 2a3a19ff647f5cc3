"""Greedy removal of input columns with exact block updates (optimal brain surgeon on column groups).

Shape suffixes: M metric outputs, I inputs, U units, S inputs of the units removed in one step, A inputs still there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.errors import NumericalError
from structprune.linalg.damped import damped_cholesky


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalPath:
    """Units in the order of their removal, and what each removal added to the objective."""

    order: Tensor
    """Unit numbers, first removed first, shape (num_remove,)."""
    cost: Tensor
    """Increase of 1/2 tr(D H D^T) by each removal, float64; units removed in one step share theirs equally."""


def greedy_removal(
    weight_MI: Tensor, inverse_II: Tensor, num_remove: int, *, width: int = 1, units_per_step: int = 1
) -> RemovalPath:
    """Remove `num_remove` groups of `width` columns, the cheapest first, re-solving the others after every step.

    Objective: 1/2 tr((V - W) H (V - W)^T) over V with removed columns zero; `inverse_II` is H^-1 in float64. Removing
    group S now costs 1/2 tr(V_S ([H^-1]_SS)^-1 V_S^T), after which V <- V - V_S ([H^-1]_SS)^-1 [H^-1]_S: and
    H^-1 <- H^-1 - [H^-1]_:S ([H^-1]_SS)^-1 [H^-1]_S: (Hassibi & Stork 1993; group form as in OSSCAR, arXiv 2403.12983).
    For a loss metric pass L^T W with F = L L^T as the weight.

    With `units_per_step` > 1 the cheapest few leave together; the update is exact for the set, only their choice
    ignores how they interact. Raises NumericalError if a pivot block is not positive definite.
    """
    weight_MA = weight_MI.to(torch.float64).clone()
    inverse_AA = inverse_II.to(torch.float64).clone()
    units_left = torch.arange(weight_MI.shape[1] // width)
    alive = torch.ones(len(units_left), dtype=torch.bool)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    removed = 0
    while removed < num_remove:
        score_U = group_costs(weight_MA, inverse_AA, width)
        score_U[~alive] = torch.inf
        count = min(units_per_step, num_remove - removed)
        # A stable sort, so that ties go to the lower unit number on every machine.
        chosen = torch.sort(score_U, stable=True).indices[:count].sort().values
        columns_S = (chosen[:, None] * width + torch.arange(width)).flatten()
        factor, info = torch.linalg.cholesky_ex(inverse_AA[columns_S][:, columns_S])
        if int(info) != 0:
            raise NumericalError("the inverse lost definiteness while columns were removed", do="raise damping")
        rows_SA = inverse_AA[columns_S]
        whitened_SM = torch.linalg.solve_triangular(factor, weight_MA[:, columns_S].T, upper=False)
        whitened_SA = torch.linalg.solve_triangular(factor, rows_SA, upper=False)
        cost = 0.5 * float(whitened_SM.square().sum())
        weight_MA.addmm_(whitened_SM.T, whitened_SA, alpha=-1)
        inverse_AA.addmm_(whitened_SA.T, whitened_SA, alpha=-1)
        alive[chosen] = False
        order.append(units_left[chosen])
        costs.append(torch.full((count,), cost / count, dtype=torch.float64))
        removed += count
        # Dead rows and columns are zero but still cost time: drop them once they are a fifth.
        if int((~alive).sum()) * 5 >= len(alive) and removed < num_remove:
            columns_A = torch.nonzero(alive.repeat_interleave(width)).flatten()
            weight_MA = weight_MA[:, columns_A]
            inverse_AA = inverse_AA[columns_A][:, columns_A]
            units_left = units_left[alive]
            alive = torch.ones(len(units_left), dtype=torch.bool)
    empty = torch.empty(0)
    return RemovalPath(
        order=torch.cat(order) if order else empty.long(), cost=torch.cat(costs) if costs else empty.double()
    )


def group_costs(weight_MA: Tensor, inverse_AA: Tensor, width: int) -> Tensor:
    """1/2 tr(V_g ([H^-1]_gg)^-1 V_g^T) for every group, shape (units,)."""
    if width == 1:
        # A dead column has a zero diagonal; its infinite or undefined cost is masked by the caller.
        return 0.5 * weight_MA.square().sum(dim=0) / inverse_AA.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    num_units = inverse_AA.shape[0] // width
    blocks = torch.stack(
        [inverse_AA[u * width : (u + 1) * width, u * width : (u + 1) * width] for u in range(num_units)]
    )
    dead = blocks.diagonal(dim1=1, dim2=2).sum(dim=1) <= 0
    blocks[dead] = torch.eye(width, dtype=torch.float64)
    weight_UMw = weight_MA.reshape(len(weight_MA), num_units, width).permute(1, 0, 2)
    solved = torch.linalg.solve(blocks, weight_UMw.transpose(1, 2))
    return 0.5 * (weight_UMw.transpose(1, 2) * solved).sum(dim=(1, 2))


def metric_root(sensitivity_OO: Tensor, damping: float = 1e-3) -> Tensor:
    """L with F + damping * mean(diag F) I = L L^T, lower triangular, float64: the map into units of the loss."""
    return damped_cholesky(sensitivity_OO, damping, "output sensitivity").factor_NN
