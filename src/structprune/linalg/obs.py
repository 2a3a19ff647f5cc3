"""Greedy removal of input columns with exact block updates (optimal brain surgeon on column groups), then exchanges.

Shape suffixes: M metric outputs, I inputs, U units, S inputs of the units that move in one step, A inputs still there,
K kept inputs, R removed inputs, P partitions, w inputs of one unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.errors import NumericalError
from structprune.linalg.cholesky import damped_cholesky, factored, inverted, solved
from structprune.linalg.gram_products import block_of, column_energies, output_energy, strips, times_gram
from structprune.rows import Rows

# A set of units changes places only if the objective falls by more than this share of it: above rounding, below use.
_MIN_GAIN = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalPath:
    """Units in the order of their removal, and what each removal added to the objective."""

    order: Tensor
    """Unit numbers, first removed first, shape (num_remove,)."""
    cost: Tensor
    """Increase of 1/2 tr(D H D^T) by each removal, float64; units removed in one step share theirs equally."""


def greedy_removal(
    weight_MI: Tensor,
    inverse_II: Tensor,
    num_remove: int,
    *,
    width: int = 1,
    units_per_step: int = 1,
    partitions: int = 1,
) -> RemovalPath:
    """Remove `num_remove` groups of `width` columns, the cheapest first, re-solving the others after every step.

    Objective: 1/2 tr((V - W) H (V - W)^T) over V with removed columns zero; `inverse_II` is H^-1 in float64. Removing
    group S now costs 1/2 tr(V_S ([H^-1]_SS)^-1 V_S^T), after which V <- V - V_S ([H^-1]_SS)^-1 [H^-1]_S: and
    H^-1 <- H^-1 - [H^-1]_:S ([H^-1]_SS)^-1 [H^-1]_S: (Hassibi & Stork 1993; group form as in OSSCAR, arXiv 2403.12983).
    For a loss metric pass L^T W with F = L L^T as the weight. Both matrices are float64 and used up: at order 28,672
    one more inverse would be 6 GiB.

    With `units_per_step` > 1 the cheapest few leave together; the update is exact for the set, only their choice
    ignores how they interact. Units come in `partitions` runs of equal length that lose as many each, in every step;
    `num_remove` is a multiple of it. Raises NumericalError if a pivot block is not positive definite.
    """
    assert num_remove % partitions == 0
    weight_MA, inverse_AA = weight_MI, inverse_II
    assert weight_MA.dtype == inverse_AA.dtype == torch.float64
    device = weight_MI.device
    units_left = torch.arange(weight_MI.shape[1] // width, device=device)
    alive = torch.ones(len(units_left), dtype=torch.bool, device=device)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    removed = 0
    while removed < num_remove:
        score_U = group_costs(weight_MA, inverse_AA, width)
        score_U[~alive] = torch.inf
        count = min(max(1, units_per_step // partitions) * partitions, num_remove - removed)
        # A stable sort, so that ties go to the lower unit number on every machine.
        order_PU = torch.sort(score_U.reshape(partitions, -1), dim=1, stable=True).indices
        firsts_P1 = torch.arange(partitions, device=device)[:, None] * order_PU.shape[1]
        chosen = (firsts_P1 + order_PU[:, : count // partitions]).flatten().sort().values
        columns_S = (chosen[:, None] * width + torch.arange(width, device=device)).flatten()
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
        # Exactly zero, not up to rounding: a wide group is told from a live one by its trace.
        weight_MA[:, columns_S] = 0
        inverse_AA[columns_S] = 0
        inverse_AA[:, columns_S] = 0
        order.append(units_left[chosen])
        costs.append(torch.full((count,), cost / count, dtype=torch.float64, device=device))
        removed += count
        # Dead rows and columns are zero but still cost time: drop them once they are a fifth.
        if int((~alive).sum()) * 5 >= len(alive) and removed < num_remove:
            columns_A = torch.nonzero(alive.repeat_interleave(width)).flatten()
            weight_MA = compacted(weight_MA, None, columns_A)
            inverse_AA = compacted(inverse_AA, columns_A, columns_A)
            units_left = units_left[alive]
            alive = torch.ones(len(units_left), dtype=torch.bool, device=device)
    empty = torch.empty(0, device=device)
    return RemovalPath(
        order=torch.cat(order) if order else empty.long(), cost=torch.cat(costs) if costs else empty.double()
    )


def group_costs(weight_MA: Tensor, inverse_AA: Tensor, width: int) -> Tensor:
    """Compute 1/2 tr(V_g ([H^-1]_gg)^-1 V_g^T) for every group, shape (units,)."""
    if width == 1:
        # A dead column has a zero diagonal; its infinite or undefined cost is masked by the caller.
        return 0.5 * column_energies(weight_MA) / inverse_AA.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    blocks_Uww = _diagonal_blocks(inverse_AA, width)
    dead = blocks_Uww.diagonal(dim1=1, dim2=2).sum(dim=1) <= 0
    blocks_Uww[dead] = torch.eye(width, dtype=torch.float64, device=blocks_Uww.device)
    return _block_costs(weight_MA, blocks_Uww)


def set_objective(weight_MI: Tensor, gram_II: Rows, delta: float, keep_U: Tensor, width: int) -> float:
    """Compute what a decision costs, solved anew: min over V of 1/2 tr((V - W) H (V - W)^T).

    V's columns of removed units are zero; H = G + delta I, `gram_II` G. Raises NumericalError if it is not positive
    definite on the kept units.
    """
    kept, removed = (torch.nonzero(mask.repeat_interleave(width)).flatten() for mask in (keep_U, ~keep_U))
    weight_MR = weight_MI[:, removed].to(torch.float64)
    own = output_energy(weight_MR, block_of(gram_II, removed, removed)) + delta * float(weight_MR.square().sum())
    gram_KK = block_of(gram_II, kept, kept)
    gram_KK.diagonal().add_(delta)
    factor = _factor(gram_KK)
    explained_KM = times_gram(weight_MR, gram_II, removed, kept).T
    torch.linalg.solve_triangular(factor, explained_KM, upper=False, out=explained_KM)
    return max(0.0, 0.5 * (own - float(column_energies(explained_KM.T).sum())))


def _factor(gram_KK: Tensor) -> Tensor:
    """Compute the lower factor in the matrix's place. Raises NumericalError if there is none."""
    factor, definite = factored(gram_KK)
    if not definite:
        raise NumericalError("the Gram matrix of the kept units is not positive definite", do="raise damping")
    return factor


def compacted(matrix_BA: Tensor, rows_C: Tensor | None, columns_C: Tensor) -> Tensor:
    """Move M[rows, columns] of ascending sets, all rows without one, to the front of M's memory, which is used up."""
    num_rows, num_columns = len(matrix_BA) if rows_C is None else len(rows_C), len(columns_C)
    if not matrix_BA.is_contiguous():
        return matrix_BA[:, columns_C] if rows_C is None else matrix_BA[rows_C][:, columns_C]
    front_BC = matrix_BA.view(-1)[: num_rows * num_columns].view(num_rows, num_columns)
    # Row i is written where no row after it lies, for it is at least as far behind in M, and rows there are longer.
    for part in strips(num_rows, matrix_BA.shape[1]):
        front_BC[part] = (matrix_BA[part] if rows_C is None else matrix_BA[rows_C[part]])[:, columns_C]
    return front_BC


def metric_root(sensitivity_OO: Tensor, damping: float = 1e-3) -> Tensor:
    """Compute L of F + damping * mean(diag F) I = L L^T, lower triangular, float64: the map into units of the loss."""
    return damped_cholesky(sensitivity_OO, damping, "output sensitivity").factor_NN


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """The units that stay after exchanges, and what the exchanges were worth."""

    keep_U: Tensor
    """Mask of the kept units, as many as at the start, shape (U,)."""
    objective_before: float
    """min over V of 1/2 tr((V - W) H (V - W)^T) for the units kept at the start, summed over tokens."""
    objective_after: float
    """The same for `keep_U`; solved anew, so it does not carry the rounding of the updates."""
    num_rounds: int
    """Moves tried; below `max_rounds`, no exchange of one kept for one removed unit lowers the objective."""


def swap_units(
    weight_MI: Tensor, gram_II: Tensor, keep_U: Tensor, *, width: int = 1, max_exchange: int = 64, max_rounds: int = 500
) -> Swapped:
    """Exchange removed and kept units while the objective falls; the number of kept units stays.

    Problem: min over sets K of f(K) = min over V, columns outside K zero, of 1/2 tr((V - W) H (V - W)^T); `weight_MI` W
    is the ridge solution on all inputs (times L^T for a loss metric L L^T), `gram_II` H the damped Gram in float64.

    A move adds the t removed units whose return lowers f the most and removes the t cheapest units again, half of those
    outstanding at a time with exact updates in between. A move that does not lower f is undone, and t halves. At t = 1
    all pairs are costed and the best is taken, so the end is a local optimum for single exchanges unless `max_rounds`
    comes first. Never worse than the start; ties go to the lower unit number. Local search over exchanges with low-rank
    updates as in OSSCAR (arXiv 2403.12983); the table of all pairs is not from there.

    Raises NumericalError if H on a set of units is not positive definite.
    """
    weight_MI = weight_MI.to(torch.float64)
    values_MI, table_II, objective = _swept(weight_MI, gram_II, keep_U, width)
    start_U, objective_before = keep_U, objective
    num_exchange = min(max_exchange, int(keep_U.sum()), int((~keep_U).sum()))
    num_rounds = 0
    while num_exchange > 0 and num_rounds < max_rounds:
        num_rounds += 1
        if num_exchange == 1:
            moved_U, change = _exchange_best_pair(values_MI, table_II, keep_U, width)
        else:
            moved_U, change = _exchange_many(values_MI, table_II, keep_U, width, num_exchange)
        if change < -_MIN_GAIN * objective:
            keep_U, objective = moved_U, objective + change
            continue
        # Sweeps undo each other, and only log2(max_exchange) moves fail: cheaper than a copy of the table per move.
        _sweep(values_MI, table_II, keep_U & ~moved_U, width, sign=1)
        _sweep(values_MI, table_II, moved_U & ~keep_U, width, sign=-1)
        num_exchange //= 2
    if torch.equal(keep_U, start_U):
        return Swapped(
            keep_U=start_U.clone(),
            objective_before=objective_before,
            objective_after=objective_before,
            num_rounds=num_rounds,
        )
    del values_MI, table_II
    objective_after = _swept(weight_MI, gram_II, keep_U, width)[2]
    # Where H is so close to singular that rounding made the sum of the changes wrong, the start stands.
    if objective_after > objective_before:
        keep_U, objective_after = start_U.clone(), objective_before
    return Swapped(
        keep_U=keep_U, objective_before=objective_before, objective_after=objective_after, num_rounds=num_rounds
    )


def _swept(weight_MI: Tensor, gram_II: Tensor, keep_U: Tensor, width: int) -> tuple[Tensor, Tensor, float]:
    """Compute all that the exchanges need to know about a kept set by one Cholesky: values, table, objective.

    The symmetric table is H swept on K: -[H_KK]^-1 in KK, [H_KK]^-1 H_KR in KR, the Schur complement
    S = H_RR - H_RK [H_KK]^-1 H_KR in RR. The values are the same sweep of W H: the re-solved V in the columns K, the
    residual correlation c = (W - V) H in the columns R. The objective is 1/2 tr(W_R S W_R^T).
    """
    kept, removed = (torch.nonzero(mask.repeat_interleave(width)).flatten() for mask in (keep_U, ~keep_U))
    factor = _factor(block_of(gram_II, kept, kept))
    cross_KR = solved(factor, block_of(gram_II, removed, kept)).T
    schur_RR = block_of(gram_II, removed, removed)
    schur_RR.addmm_(block_of(gram_II, removed, kept), cross_KR, alpha=-1)
    table_II = torch.empty_like(gram_II)
    table_II[kept[:, None], kept] = inverted(factor).neg_()
    table_II[kept[:, None], removed] = cross_KR
    table_II[removed[:, None], kept] = cross_KR.T
    table_II[removed[:, None], removed] = schur_RR
    values_MI = weight_MI.clone()
    weight_MR = weight_MI[:, removed]
    values_MI[:, kept] += weight_MR @ cross_KR.T
    values_MI[:, removed] = weight_MR @ schur_RR
    return values_MI, table_II, 0.5 * float((values_MI[:, removed] * weight_MR).sum())


def _sweep(values_MI: Tensor, table_II: Tensor, units_U: Tensor, width: int, *, sign: int) -> float:
    """Add (sign 1) or remove (sign -1) the units of the mask, in place; the change of the objective.

    The pivot P is S_SS or [H_KK]^-1_SS and the change -sign 1/2 tr(x_S P^-1 x_S^T), x the values: the gain of a removed
    set, the cost of a kept one. The sweep operator (Goodnight 1979) on a block, the same rank update both ways.
    """
    columns_S = torch.nonzero(units_U.repeat_interleave(width)).flatten()
    factor, info = torch.linalg.cholesky_ex(sign * table_II[columns_S][:, columns_S])
    if int(info) != 0:
        raise NumericalError("the Gram matrix lost definiteness while units were exchanged", do="raise damping")
    whitened_SM = torch.linalg.solve_triangular(factor, values_MI[:, columns_S].T, upper=False)
    whitened_SI = torch.linalg.solve_triangular(factor, table_II[columns_S], upper=False)
    values_MI.addmm_(whitened_SM.T, whitened_SI, alpha=-sign)
    table_II.addmm_(whitened_SI.T, whitened_SI, alpha=-sign)
    solved_SI = torch.linalg.solve_triangular(factor.T, whitened_SI, upper=True)
    solved_SI[:, columns_S] = -sign * torch.cholesky_inverse(factor)
    table_II[columns_S] = solved_SI
    table_II[:, columns_S] = solved_SI.T
    values_MI[:, columns_S] = torch.linalg.solve_triangular(factor.T, whitened_SM, upper=True).T
    return -sign * 0.5 * float(whitened_SM.square().sum())


def _exchange_many(
    values_MI: Tensor, table_II: Tensor, keep_U: Tensor, width: int, num_exchange: int
) -> tuple[Tensor, float]:
    """Add the units with the largest gains, then remove as many, the cheapest half first; the new mask, the change."""
    chosen_U = _lowest(-_swept_costs(values_MI, table_II, width), ~keep_U, num_exchange)
    change = _sweep(values_MI, table_II, chosen_U, width, sign=1)
    keep_U = keep_U | chosen_U
    while num_exchange > 0:
        count = (num_exchange + 1) // 2
        chosen_U = _lowest(_swept_costs(values_MI, table_II, width), keep_U, count)
        change += _sweep(values_MI, table_II, chosen_U, width, sign=-1)
        keep_U = keep_U & ~chosen_U
        num_exchange -= count
    return keep_U, change


def _exchange_best_pair(values_MI: Tensor, table_II: Tensor, keep_U: Tensor, width: int) -> tuple[Tensor, float]:
    """Make the best exchange of one removed for one kept unit; the new mask, the change (which may be positive)."""
    costs = _pair_costs(values_MI, table_II, keep_U, width)
    # argmin may return any of equal minima.
    removed_unit, kept_unit = torch.nonzero(costs == costs.min())[0].tolist()
    units = torch.arange(len(keep_U), device=keep_U.device)
    enters_U = units == torch.nonzero(~keep_U)[removed_unit]
    leaves_U = units == torch.nonzero(keep_U)[kept_unit]
    change = _sweep(values_MI, table_II, enters_U, width, sign=1)
    change += _sweep(values_MI, table_II, leaves_U, width, sign=-1)
    return (keep_U | enters_U) & ~leaves_U, change


def _pair_costs(values_MI: Tensor, table_II: Tensor, keep_U: Tensor, width: int) -> Tensor:
    """Compute the objective's change by each exchange: rows are removed units r, columns kept units k, ascending.

    With r back, V_k becomes V_k - c_r S_r^-1 B_rk and [H^-1]_kk grows by B_kr S_r^-1 B_rk, B = H_RK [H_KK]^-1; the
    pair cost is the cost of k then, less the gain of r.
    """
    kept, removed = (torch.nonzero(mask.repeat_interleave(width)).flatten() for mask in (keep_U, ~keep_U))
    values_MK, values_MR = values_MI[:, kept], values_MI[:, removed]
    cross_RK = table_II[removed][:, kept]
    if width == 1:
        # All pairs in a few products; rounding in the expanded square can mislead the choice, not the change booked.
        schur_R, inverse_K = table_II.diagonal()[removed, None], -table_II.diagonal()[kept]
        square_R = values_MR.square().sum(dim=0)[:, None]
        ratio_RK = cross_RK / schur_R
        energy_RK = (values_MR.T @ values_MK).mul_(ratio_RK).mul_(-2.0).add_(column_energies(values_MK))
        energy_RK.addcmul_(ratio_RK.square(), square_R)
        grown_RK = cross_RK.mul_(ratio_RK).add_(inverse_K)
        return energy_RK.clamp_min_(0).div_(grown_RK).sub_(square_R / schur_R).mul_(0.5)
    rows: list[Tensor] = []
    blocks_Uww = _diagonal_blocks(table_II, width)
    num_kept = len(kept) // width
    for index, schur_ww in enumerate(blocks_Uww[~keep_U]):
        own = slice(index * width, (index + 1) * width)
        solved_wK = torch.linalg.solve(schur_ww, cross_RK[own])
        cross_Uww, solved_Uww = (x.T.reshape(num_kept, width, width) for x in (cross_RK[own], solved_wK))
        grown_Uww = cross_Uww @ solved_Uww.transpose(1, 2) - blocks_Uww[keep_U]
        cost_U = _block_costs(values_MK - values_MR[:, own] @ solved_wK, grown_Uww)
        rows.append(cost_U - _block_costs(values_MR[:, own], schur_ww[None]))
    return torch.stack(rows)


def _swept_costs(values_MI: Tensor, table_II: Tensor, width: int) -> Tensor:
    """Compute the gain of every removed unit and the cost of every kept one, both positive, shape (U,)."""
    # A block of the table is S_r or -[H_KK]^-1_kk: definite either way, so the sign can wait until after the solve.
    if width == 1:
        return 0.5 * values_MI.square().sum(dim=0) / table_II.diagonal().abs()
    return _block_costs(values_MI, _diagonal_blocks(table_II, width)).abs()


def _lowest(score_U: Tensor, among_U: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest scores among the units of a mask; ties take the lower unit number."""
    chosen_U = torch.zeros_like(among_U)
    chosen_U[torch.sort(score_U.masked_fill(~among_U, torch.inf), stable=True).indices[:count]] = True
    return chosen_U


def _diagonal_blocks(matrix_AA: Tensor, width: int) -> Tensor:
    """Stack the units' blocks on the diagonal, shape (U, w, w)."""
    starts = range(0, matrix_AA.shape[0], width)
    return torch.stack([matrix_AA[a : a + width, a : a + width] for a in starts])


def _block_costs(weight_MA: Tensor, blocks_Uww: Tensor) -> Tensor:
    """Compute 1/2 tr(V_g B_g^-1 V_g^T) for every group, shape (U,)."""
    num_units, width, _ = blocks_Uww.shape
    weight_UMw = weight_MA.reshape(len(weight_MA), num_units, width).permute(1, 0, 2)
    solved = torch.linalg.solve(blocks_Uww, weight_UMw.transpose(1, 2))
    return 0.5 * (weight_UMw.transpose(1, 2) * solved).sum(dim=(1, 2))
