"""Blocks of inputs, from the first to the last: what goes is made up for by the inputs behind it.

SparseGPT (arXiv 2301.00774), Thanos (arXiv 2504.05346) and APT (arXiv 2410.15567) are one loop. With H^-1 = U^T U, U
upper, inv(H[i:, i:]) = U[i:, i:]^T U[i:, i:], so one factor serves every block, where published code inverts what is
left again and again. They differ in what chooses the weights of a block, and in whether those leave one after the other
or all at once:

    one after the other   e = w_i / U_ii;   W[:, i:] -= e U[i, i:]
    all at once           lambda = W[o, q] (R[q, q])^-1;   W[o, i1:] -= lambda R[q, :],   R = first rows of the inverse

All works in unit coordinates (`unit.py`). There the score w^2 / [U_jj]^2 is what it is in the original ones.

Shape suffixes: I inputs, O outputs, B inputs of one block, R inputs from the block on, S rows of a strip.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from structprune.linalg.cholesky import damped_cholesky, inverse_factored
from structprune.patterns import NM, Pattern
from structprune.solvers.elements.problem import Pruner, SparseProblem, SparseSolution
from structprune.solvers.elements.unit import scales, unit_gram, wanted_weight, working_dtype

# Inputs of a block. Joint removal solves for as many at once, and every row by itself.
_BLOCK, _JOINT_BLOCK = 128, 64
# Inputs that are removed one after the other, before those behind them hear of it.
_TURN = 16
# Sets of a group that are tried one by one: those of 4:8.
_MOST_SETS = 70
_STRIP_NUMBERS = 4 * 2**20
_WIDE, _NARROW_DAMPING = 16384, 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of inputs in front of its removal, transposed: rows are inputs."""

    weight_RO: Tensor
    """The weight of this block and all inputs behind it, as they are by now."""
    factor_BR: Tensor
    """The block's rows of U."""
    width: int
    start: int
    removed_O: Tensor
    """How many weights of each output went before."""
    num_inputs: int
    pattern: Pattern

    @property
    def inverse_BR(self) -> Tensor:
        """First rows of inv(H[start:, start:])."""
        return self.factor_BR[:, : self.width].T @ self.factor_BR


Choice = Callable[[Block], Tensor]
"""What goes of a block: a mask (B, O)."""


def _by_factor(block: Block) -> Tensor:
    """Choose by w^2 / U_jj^2 the block's own share of the least, as SparseGPT does."""
    loss_BO = (block.weight_RO[: block.width] / block.factor_BR.diagonal()[:, None]).square()
    return block.pattern.remove_in_block(loss_BO.T, block.start).T


def _by_inverse(block: Block) -> Tensor:
    """Choose by w^2 / [H^-1]_jj of the inputs that are left the block's own share (APT, equation 14).

    In groups every set that may go is tried by what its joint removal costs (equation 12), where there are few.
    """
    pattern = block.pattern
    if isinstance(pattern, NM) and math.comb(pattern.of, pattern.keep) <= _MOST_SETS:
        return _by_sets(block, pattern)
    inverse_B = block.inverse_BR.diagonal()
    loss_BO = block.weight_RO[: block.width].square() / inverse_B[:, None]
    return block.pattern.remove_in_block(loss_BO.T, block.start).T


def _by_sets(block: Block, pattern: NM) -> Tensor:
    """Choose of every group the set q of least w_q ([H^-1]_qq)^-1 w_q^T; of equal ones the first."""
    inverse_BB = block.inverse_BR[:, : block.width]
    gone = list(itertools.combinations(range(pattern.of), pattern.of - pattern.keep))
    gone_BO = torch.zeros_like(block.weight_RO[: block.width], dtype=torch.bool)
    for start in range(0, block.width, pattern.of):
        own = slice(start, start + pattern.of)
        weight_MO, inverse_MM = block.weight_RO[own], inverse_BB[own, own]
        best_O = weight_MO.new_full(weight_MO.shape[1:], torch.inf)
        place_O = torch.zeros_like(best_O, dtype=torch.int64)
        for place, indices in enumerate(gone):
            lower_QQ = torch.linalg.cholesky(inverse_MM[indices, :][:, indices])
            cost_O = torch.linalg.solve_triangular(lower_QQ, weight_MO[indices, :], upper=False).square_().sum(dim=0)
            better_O = cost_O < best_O
            best_O, place_O = torch.where(better_O, cost_O, best_O), torch.where(better_O, place, place_O)
        sets_QM = torch.zeros(len(gone), pattern.of, dtype=torch.bool, device=best_O.device)
        sets_QM.scatter_(1, torch.tensor(gone, device=best_O.device), value=True)
        gone_BO[own] = sets_QM[place_O].T
    return gone_BO


def _by_norm(block: Block) -> Tensor:
    """Choose by Wanda's score among all inputs that are left; what of the least lies in the block goes (Thanos)."""
    # Inputs have unit energy, so the weight is the score.
    gone_OR = block.pattern.remove_of_rest(block.weight_RO.T.abs(), block.removed_O, block.num_inputs)
    return gone_OR[:, : block.width].T


def factor_dtype(num_inputs: int) -> torch.dtype:
    """Return what a factor of this order is computed in: float32 for the widest maps of the largest models."""
    return torch.float64 if num_inputs <= _WIDE else torch.float32


def upper_factor(problem: SparseProblem) -> tuple[Tensor, bool]:
    """Compute U with H^-1 = U^T U, H the damped Gram in unit coordinates, and whether the damping had to be raised.

    In place: one square, in float64, or in float32 where that would be larger than what it is made of may be. There the
    ridge is at least 0.01, with which float32 knows such a factor to a few thousandths. What another map of the same
    input has made is taken as it is. Raises NumericalError.
    """
    shared = problem.shared
    if shared is not None and shared.factor_II is not None and shared.damping == problem.damping:
        return shared.factor_II, shared.raised
    if shared is not None:
        shared.factor_II = None
    moments, dtype = problem.moments, factor_dtype(problem.weight_OI.shape[1])
    least = problem.damping if dtype == torch.float64 else max(problem.damping, _NARROW_DAMPING)
    found = damped_cholesky(lambda: unit_gram(moments, dtype), least, "the map's inputs", inverse_factored)
    raised = found.num_raises > 0 or least > problem.damping
    if shared is not None:
        shared.factor_II, shared.damping, shared.raised = found.factor_NN, problem.damping, raised
    return found.factor_NN, raised


def prune_blockwise(
    problem: SparseProblem,
    choose: Choice,
    removal: Literal["in turn", "at once"],
    block: int = _BLOCK,
    *,
    keep_OI: Tensor | None = None,
) -> SparseSolution:
    """Prune block after block; with `keep_OI` what goes is known. Raises NumericalError as `upper_factor` does."""
    factor_II, raised = upper_factor(problem)
    dtype = working_dtype(problem)
    scale_I, silent_I = scales(problem.moments)
    weight_IO = wanted_weight(problem, problem.damping).mul_(scale_I.to(dtype)).T.contiguous()
    weight_IO[silent_I] = 0
    gone_IO = _remove_blocks(problem, factor_II, weight_IO, choose, removal, block, keep_OI)
    del factor_II
    weight_IO.div_(scale_I.to(dtype)[:, None])
    if bool(silent_I.any()):
        weight_IO[silent_I] = problem.weight_OI[:, silent_I].T.to(dtype)
    return SparseSolution(
        # In the layout that it was worked in: a copy would be one more of its size.
        weight_OI=weight_IO.masked_fill_(gone_IO, 0).T,
        keep_OI=gone_IO.logical_not_().T,
        status="damping-raised" if raised else "ok",
    )


def _remove_blocks(
    problem: SparseProblem,
    factor_II: Tensor,
    weight_IO: Tensor,
    choose: Choice,
    removal: Literal["in turn", "at once"],
    block: int,
    keep_OI: Tensor | None,
) -> Tensor:
    """Remove block after block of the weight, in place: what is gone, (I, O)."""
    dtype, group = weight_IO.dtype, problem.pattern.group
    inputs, outputs = weight_IO.shape
    gone_IO = torch.zeros(inputs, outputs, dtype=torch.bool, device=weight_IO.device)
    removed_O = torch.zeros(outputs, dtype=torch.int64, device=weight_IO.device)
    step = max(group, block // group * group)
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        now = Block(
            weight_RO=weight_IO[start:],
            factor_BR=factor_II[start:stop, start:].to(dtype),
            width=stop - start,
            start=start,
            removed_O=removed_O,
            num_inputs=inputs,
            pattern=problem.pattern,
        )
        if keep_OI is not None:
            gone_IO[start:stop] = ~keep_OI[:, start:stop].T
        elif group == 1 or removal == "at once":
            gone_IO[start:stop] = choose(now)
        if removal == "at once":
            _remove_at_once(now, gone_IO[start:stop])
        else:
            _remove_in_turn(now, gone_IO[start:stop], choose if keep_OI is None and group > 1 else None)
        removed_O += gone_IO[start:stop].sum(dim=0)
    return gone_IO


def _remove_in_turn(block: Block, gone_BO: Tensor, choose: Choice | None) -> None:
    """Remove input after input, in place; with `choose` every group is chosen when its first input comes."""
    weight_RO, width, group = block.weight_RO, block.width, block.pattern.group
    # Over its diagonal a row of U says what a weight that goes leaves of itself, 0, and adds to those behind it.
    share_BR = block.factor_BR / block.factor_BR.diagonal()[:, None]
    error_BO = gone_BO.to(weight_RO.dtype)
    step = max(group, _TURN // group * group)
    for start in range(0, width, step):
        stop = min(start + step, width)
        for place in range(start, stop):
            if choose is not None and place % group == 0:
                gone_BO[place : place + group] = choose(_rest_of(block, place, group))
                error_BO[place : place + group] = gone_BO[place : place + group]
            error_O = error_BO[place].mul_(weight_RO[place])
            weight_RO[place:stop].addr_(share_BR[place, place:stop], error_O, alpha=-1)
        # Inputs further behind get what all of these leave in one product.
        weight_RO[stop:width].addmm_(share_BR[start:stop, stop:width].T, error_BO[start:stop], alpha=-1)
    weight_RO[width:].addmm_(share_BR[:, width:].T, error_BO, alpha=-1)


def _rest_of(block: Block, place: int, width: int) -> Block:
    """Return the part of a block from `place` on, as it is by now."""
    return Block(
        weight_RO=block.weight_RO[place:],
        factor_BR=block.factor_BR[place : place + width, place:],
        width=width,
        start=block.start + place,
        removed_O=block.removed_O,
        num_inputs=block.num_inputs,
        pattern=block.pattern,
    )


def _remove_at_once(block: Block, gone_BO: Tensor) -> None:
    """Remove what goes of a block from each output at once, in place: exact, whatever went before."""
    inverse_BR, width = block.inverse_BR, block.width
    own_BB = inverse_BR[:, :width]
    identity_BB = torch.eye(width, dtype=own_BB.dtype, device=own_BB.device)
    step = max(1, _STRIP_NUMBERS // width**2)
    for start in range(0, gone_BO.shape[1], step):
        rows = slice(start, start + step)
        gone_SB = gone_BO[:, rows].T
        both_SBB = gone_SB[:, :, None] & gone_SB[:, None, :]
        factor_SBB = torch.linalg.cholesky(torch.where(both_SBB, own_BB, identity_BB))
        wanted_SB1 = torch.where(gone_SB, block.weight_RO[:width, rows].T, 0)[:, :, None]
        lambda_SB = torch.cholesky_solve(wanted_SB1, factor_SBB)[:, :, 0]
        block.weight_RO[:, rows].addmm_(inverse_BR.T, lambda_SB.T, alpha=-1)
    block.weight_RO[:width].masked_fill_(gone_BO, 0)


def shares(inputs: int) -> int:
    """Count the factor, which other maps of the same input are solved from: bytes."""
    return inputs**2 * factor_dtype(inputs).itemsize


def workspace(inputs: int, outputs: int) -> int:
    """Count the factor, which takes the place of the inverse, the weight twice as it is turned, and masks: bytes."""
    strips = 4 * _STRIP_NUMBERS * 4 + 3 * _BLOCK * (inputs + outputs) * 8
    return shares(inputs) + inputs * outputs * (2 * 4 + 2) + strips


def _ranking_workspace(inputs: int, outputs: int) -> int:
    """Count the scores of all inputs that are left too, and their order: bytes."""
    return workspace(inputs, outputs) + inputs * outputs * 24


SPARSEGPT_CHOICE: Choice = _by_factor
SPARSEGPT = Pruner(
    prune=partial(prune_blockwise, choose=_by_factor, removal="in turn"),
    reads=frozenset({"gram"}),
    workspace=workspace,
    shares=shares,
)
THANOS = Pruner(
    prune=partial(prune_blockwise, choose=_by_norm, removal="at once", block=_JOINT_BLOCK),
    reads=frozenset({"gram"}),
    workspace=_ranking_workspace,
    shares=shares,
)
APT = Pruner(
    prune=partial(prune_blockwise, choose=_by_inverse, removal="at once", block=_JOINT_BLOCK),
    reads=frozenset({"gram"}),
    workspace=workspace,
    shares=shares,
)
