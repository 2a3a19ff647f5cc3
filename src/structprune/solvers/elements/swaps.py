"""1-swaps: a weight that stays and one of its row that went change places where the error falls, one pair at a time.

With w the wanted weight of a row, r what is removed of it and c = r A, A the damped Gram in unit coordinates,

    removing p and restoring q adds   2 w_p c_p + w_p^2 A_pp  -  2 w_q c_q + w_q^2 A_qq  -  2 w_p w_q A_pq

to r A r^T: exact for weights that stay as they are (derived here; the idea of exchanges is SparseSwaps', arXiv
2512.10922, whose code was not public). In groups of N:M every pair of a group is tried and the best of the row is
taken. Elsewhere a row has too many pairs: the cheapest removal with the best restoration beside it, and the best
restoration with the cheapest removal, whichever gains more. Rows keep their counts, and the error of none rises.

Shape suffixes: I inputs, O outputs, S some of the rows, G groups, M places of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.patterns import sparse
from structprune.solvers.elements.problem import SparseProblem, SparseSolution, Update
from structprune.solvers.elements.unit import (
    UnitWeight,
    damped_gram,
    group_bytes,
    refit_bytes,
    refit_rows,
    row_groups,
    working_dtype,
)

# Exchanges of a row, as a share of its inputs, and the share of its error that one must gain.
_MOST, _LEAST_GAIN = 0.25, 1e-4
# Places of a group whose pairs are tried for as many rows as are worked on together; of larger ones fewer rows.
_GROUP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """The best exchange of every row."""

    out_S: Tensor
    """Which weight goes."""
    in_S: Tensor
    """Which comes back."""
    added_S: Tensor
    """What that adds to the row's error."""


def swapped_rows(gram_II: Tensor, weight_SI: Tensor, keep_SI: Tensor, group: int) -> Tensor:
    """Exchange weights of some rows while it pays, within groups of so many inputs (1: anywhere): the new mask."""
    keep_SI = keep_SI.clone()
    removed_SI = weight_SI * ~keep_SI
    pull_SI = removed_SI @ gram_II
    least_S = _LEAST_GAIN * (removed_SI * pull_SI).sum(dim=1)
    del removed_SI
    find = _best_anywhere if group == 1 else _best_in_groups
    for _ in range(max(1, round(_MOST * len(gram_II)))):
        pair = find(gram_II, weight_SI, pull_SI, keep_SI, group)
        rows = (pair.added_S < -least_S).nonzero().flatten()
        if not len(rows):
            break
        gone, back = pair.out_S[rows], pair.in_S[rows]
        keep_SI[rows, gone] = False
        keep_SI[rows, back] = True
        change_SI = gram_II[gone] * weight_SI[rows, gone][:, None]
        change_SI.sub_(gram_II[back] * weight_SI[rows, back][:, None])
        pull_SI.index_add_(0, rows, change_SI)
    return keep_SI


def _costs(gram_II: Tensor, weight_SI: Tensor, pull_SI: Tensor, keep_SI: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each removal and each restoration adds alone, infinity where there is none."""
    own_SI = weight_SI.square() * gram_II.diagonal()
    pulled_SI = weight_SI * pull_SI
    removal_SI = torch.where(keep_SI, own_SI.add(pulled_SI, alpha=2), torch.inf)
    return removal_SI, torch.where(keep_SI, torch.inf, own_SI.sub(pulled_SI, alpha=2))


def _best_in_groups(gram_II: Tensor, weight_SI: Tensor, pull_SI: Tensor, keep_SI: Tensor, group: int) -> _Pair:
    """Try all pairs of every group."""
    removal_SI, return_SI = _costs(gram_II, weight_SI, pull_SI, keep_SI)
    rows, inputs = weight_SI.shape
    starts = torch.arange(0, inputs, group, device=gram_II.device)
    places = starts[:, None] + torch.arange(group, device=gram_II.device)
    between_GMM = gram_II[places[:, :, None], places[:, None, :]]
    weight_SGM = weight_SI.view(rows, -1, group)
    added = removal_SI.view(rows, -1, group)[..., :, None] + return_SI.view(rows, -1, group)[..., None, :]
    added -= 2 * between_GMM * weight_SGM[..., :, None] * weight_SGM[..., None, :]
    best_S, place_S = added.view(rows, -1).min(dim=1)
    start_S = place_S // group**2 * group
    return _Pair(out_S=start_S + place_S % group**2 // group, in_S=start_S + place_S % group, added_S=best_S)


def _best_anywhere(gram_II: Tensor, weight_SI: Tensor, pull_SI: Tensor, keep_SI: Tensor, group: int) -> _Pair:
    """Try all partners of the cheapest removal and of the best restoration."""
    removal_SI, return_SI = _costs(gram_II, weight_SI, pull_SI, keep_SI)
    least_S, out_S = removal_SI.min(dim=1)
    most_S, in_S = return_SI.min(dim=1)

    def beside(place_S: Tensor, alone_S: Tensor, other_SI: Tensor) -> tuple[Tensor, Tensor]:
        own_S1 = weight_SI.gather(1, place_S[:, None])
        added_SI = other_SI - 2 * own_S1 * weight_SI * gram_II[place_S]
        best_S, partner_S = added_SI.min(dim=1)
        return best_S + alone_S, partner_S

    first_S, back_S = beside(out_S, least_S, return_SI)
    second_S, gone_S = beside(in_S, most_S, removal_SI)
    better_S = first_S <= second_S
    return _Pair(
        out_S=torch.where(better_S, out_S, gone_S),
        in_S=torch.where(better_S, back_S, in_S),
        added_S=torch.minimum(first_S, second_S),
    )


def _swapped(problem: SparseProblem, solution: SparseSolution) -> tuple[UnitWeight, Tensor]:
    wanted, gram_II = UnitWeight.of(problem), damped_gram(problem)
    keep_OI = torch.empty_like(solution.keep_OI, memory_format=torch.contiguous_format)
    group = problem.pattern.group
    for part in row_groups(*keep_OI.shape):
        # Pairs of large groups are many.
        step = max(1, (part.stop - part.start) // max(1, group // _GROUP))
        for start in range(part.start, part.stop, step):
            rows = slice(start, min(start + step, part.stop))
            keep_OI[rows] = swapped_rows(gram_II, wanted.rows(rows), solution.keep_OI[rows], group)
    return wanted, keep_OI


def swap(problem: SparseProblem, solution: SparseSolution) -> SparseSolution:
    """Exchange weights, and go back to those of the dense model."""
    _, keep_OI = _swapped(problem, solution)
    weight_OI = sparse(problem.weight_OI.to(working_dtype(problem)), keep_OI)
    return SparseSolution(weight_OI=weight_OI, keep_OI=keep_OI, status=solution.status)


def swap_and_refit(problem: SparseProblem, solution: SparseSolution) -> SparseSolution:
    """Exchange weights, and solve for those that stay by least squares."""
    wanted, keep_OI = _swapped(problem, solution)
    return SparseSolution(weight_OI=refit_rows(problem, wanted, keep_OI), keep_OI=keep_OI, status=solution.status)


def workspace(inputs: int, outputs: int) -> int:
    """Count A, the mask, the weight, and of some rows all pairs of groups of eight: bytes."""
    return inputs**2 * 4 + inputs * outputs * (4 + 1) + group_bytes(inputs, outputs, 32)


def refitted_workspace(inputs: int, outputs: int) -> int:
    """Count the exchange, or the refit beside the mask: bytes."""
    return max(workspace(inputs, outputs), refit_bytes(inputs, outputs) + inputs * outputs)


SWAPS = Update(solve=swap, reads=frozenset({"gram"}), workspace=workspace)
SWAPS_REFIT = Update(solve=swap_and_refit, reads=frozenset({"gram"}), workspace=refitted_workspace)
