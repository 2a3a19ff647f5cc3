"""FISTAPruner: an l1 penalty makes the zeros, rounding their exact number (arXiv 2408.03728).

    min over V   1/2 tr((V - W_d) G (V - W_d)^T) + lambda sum |v|

by FISTA: gradient, soft threshold lambda / L, momentum. After some steps the largest weights stay (rounding). Where
rounding makes much of the whole error lambda grows, else it shrinks; the best rounded weight is kept, and the next
round begins with it. No code was published; the formulas are those of the paper's reviews, checked here.

Two forms. `FISTA` is as published: raw coordinates, from SparseGPT's answer, no ridge. Only lambda is searched on a
logarithmic scale below max |C|: the published bisection of [0, 10^6] jumps to where everything is zero. `FISTA_UNIT` is
ours: unit coordinates, where rounding is not by raw magnitude, and a least-squares refit on the mask, without which the
penalty's shrinkage stays in the weights.

Shape suffixes: I inputs, O outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structprune.patterns import Pattern, sparse
from structprune.solvers.elements import blockwise
from structprune.solvers.elements.problem import Pruner, SparseProblem, SparseSolution
from structprune.solvers.elements.unit import UnitProblem, refit_unit, scales, unit_problem

_INNER_STEPS, _PATIENCE, _MOST_ROUNDS = 20, 3, 20
_ROUNDING_SHARE = 0.3
# Bounds of lambda as shares of max |C|, and where the search begins.
_LEAST, _MOST, _FIRST = 1e-6, 1.0, 1e-3
_POWER_STEPS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quadratic:
    """1/2 tr((V - W) G (V - W)^T) in whatever coordinates."""

    gram_II: Tensor
    wanted_OI: Tensor
    product_OI: Tensor
    """W G."""

    @classmethod
    def of(cls, gram_II: Tensor, wanted_OI: Tensor) -> _Quadratic:
        return cls(gram_II=gram_II, wanted_OI=wanted_OI, product_OI=wanted_OI @ gram_II)

    def error(self, weight_OI: Tensor, other_OI: Tensor | None = None) -> float:
        """Compute |V X - W X|, or |V X - V' X|."""
        difference_OI = weight_OI - (self.wanted_OI if other_OI is None else other_OI)
        return math.sqrt(max(0.0, float(((difference_OI @ self.gram_II) * difference_OI).sum(dtype=torch.float64))))

    def largest_curvature(self) -> float:
        """Bound the largest eigenvalue of G by power iteration."""
        vector_I = torch.ones(len(self.gram_II), dtype=self.gram_II.dtype, device=self.gram_II.device)
        for _ in range(_POWER_STEPS):
            vector_I = self.gram_II @ (vector_I / vector_I.norm())
        # From below, but by little: the step is a hundredth shorter.
        return 1.01 * float(vector_I.norm())


def prune_fista(problem: SparseProblem) -> SparseSolution:
    """Prune as published, from SparseGPT's answer. Raises NumericalError for a Gram without an inverse."""
    start = blockwise.SPARSEGPT.prune(problem)
    total, dtype = problem.moments, start.weight_OI.dtype
    scale_I, silent_I = scales(total)
    unit = unit_problem(problem)
    # Raw coordinates, of mean energy 1.
    mean = float(scale_I.square().mean())
    raw_I = (scale_I / math.sqrt(mean)).to(dtype)
    unit.gram_II.diagonal().fill_(1)
    gram_II = unit.gram_II.mul_(raw_I[:, None]).mul_(raw_I)
    wanted_OI = unit.weight_OI.div_(scale_I.to(dtype))
    del unit
    best_OI, rounds = _searched(_Quadratic.of(gram_II, wanted_OI), start.weight_OI, problem.pattern)
    keep_OI = problem.pattern.keep_largest(best_OI.abs())
    raw = UnitProblem(gram_II=gram_II, weight_OI=wanted_OI, scale_I=torch.ones_like(scale_I), silent_I=silent_I)
    weight_OI = raw.original(best_OI, keep_OI, problem.weight_OI)
    return replace(start, weight_OI=weight_OI, keep_OI=keep_OI, statistics={"rounds": float(rounds)})


def prune_fista_unit(problem: SparseProblem) -> SparseSolution:
    """Prune in unit coordinates from the wanted weight, and refit what stays."""
    unit = unit_problem(problem)
    start_OI = sparse(unit.weight_OI, problem.pattern.keep_largest(unit.weight_OI.abs()))
    best_OI, rounds = _searched(_Quadratic.of(unit.gram_II, unit.weight_OI), start_OI, problem.pattern)
    keep_OI = problem.pattern.keep_largest(best_OI.abs())
    answer_OI = refit_unit(unit, keep_OI, start_OI=sparse(best_OI, keep_OI))
    return SparseSolution(
        weight_OI=unit.original(answer_OI, keep_OI, problem.weight_OI),
        keep_OI=keep_OI,
        statistics={"rounds": float(rounds)},
    )


def _searched(loss: _Quadratic, start_OI: Tensor, pattern: Pattern) -> tuple[Tensor, int]:
    """Search lambda on a logarithmic scale: the best rounded weight, and how many rounds it took."""
    curvature, largest = loss.largest_curvature(), float(loss.product_OI.abs().max())
    low, high, share = math.log(_LEAST), math.log(_MOST), math.log(_FIRST)
    best_OI, least = start_OI, loss.error(start_OI)
    fruitless = rounds = 0
    while fruitless < _PATIENCE and rounds < _MOST_ROUNDS and largest > 0:
        rounds += 1
        smooth_OI = minimise(loss, best_OI, math.exp(share) * largest, curvature)
        rounded_OI = sparse(smooth_OI, pattern.keep_largest(smooth_OI.abs()))
        total, rounding = loss.error(rounded_OI), loss.error(rounded_OI, smooth_OI)
        if total < least:
            best_OI, least, fruitless = rounded_OI, total, 0
        else:
            fruitless += 1
        if rounding > _ROUNDING_SHARE * total:
            low = share
        else:
            high = share
        share = (low + high) / 2
    return best_OI, rounds


def minimise(loss: _Quadratic, start_OI: Tensor, penalty: float, curvature: float, steps: int = _INNER_STEPS) -> Tensor:
    """Take some steps of FISTA on the penalised problem (Beck and Teboulle 2009)."""
    now_OI = ahead_OI = start_OI
    momentum = 1.0
    for _ in range(steps):
        point_OI = ahead_OI - (ahead_OI @ loss.gram_II - loss.product_OI) / curvature
        next_OI = torch.nn.functional.softshrink(point_OI, penalty / curvature)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead_OI = next_OI + (next_OI - now_OI) * ((momentum - 1) / following)
        now_OI, momentum = next_OI, following
    return now_OI


def workspace(inputs: int, outputs: int) -> int:
    """Count SparseGPT's answer, or A and its product, and some of the weight's size with masks: bytes."""
    search = inputs**2 * (8 + 8) + inputs * outputs * (14 * 4 + 12 + 3)
    return max(blockwise.workspace(inputs, outputs), search)


FISTA = Pruner(prune=prune_fista, reads=frozenset({"gram"}), workspace=workspace)
FISTA_UNIT = Pruner(prune=prune_fista_unit, reads=frozenset({"gram"}), workspace=workspace)
