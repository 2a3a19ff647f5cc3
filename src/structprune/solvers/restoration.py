"""Consumer weights on the kept inputs: cut, or re-solved by least squares.

Shape suffixes: O outputs, I inputs, K kept inputs, P removed inputs, U units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from structprune.linalg.damped import damped_cholesky, solved
from structprune.linalg.squares import add_columns, block_of, fitting_error, output_energy, times_gram
from structprune.types import LayerProblem, SolveResult

# Ridges that are tried on held-out windows, as shares of the Gram's mean diagonal.
_LOCAL_GRID = (1e-3, 1e-2, 1e-1, 1.0)
_PATH_GRID = (1e-2, 1e-1, 1.0, 10.0, 100.0)


def mask_only(problem: LayerProblem, keep_U: Tensor) -> SolveResult:
    """Drop the removed columns and leave the others as they are."""
    kept_K = problem.kept_inputs(keep_U)
    return SolveResult(weight_OK=problem.weight_OI[:, kept_K], status="ok", statistics={})


def mean_bias(problem: LayerProblem, keep_U: Tensor) -> SolveResult:
    """Drop the removed columns and add what they give on average: the bias W_P E[x_P] (FLAP, arXiv 2312.11983)."""
    assert problem.sum_I is not None
    removed_P = problem.kept_inputs(~keep_U)
    mean_P = problem.sum_I[removed_P] / problem.num_tokens
    bias_O = problem.weight_OI[:, removed_P].to(torch.float64) @ mean_P
    result = mask_only(problem, keep_U)
    return replace(result, bias_O=bias_O.to(problem.weight_OI.dtype))


def least_squares(problem: LayerProblem, keep_U: Tensor) -> SolveResult:
    """min over V of sum_t |V x_K - y|^2 + ridge toward the original weights, solved in float64.

    V = W_K + W_P G_PK (G_KK + delta I)^-1 + R_K (G_KK + delta' I)^-1 with R = C - W G and C = sum y x^T. The first
    correction makes up for the removed inputs: for the local target y = W x, where R is zero, it is the restoration of
    FASP (arXiv 2501.09412) with the ridge drawn toward the original weight instead of zero. The second makes up for
    what earlier blocks got wrong; it fits a residual that is mostly noise to these inputs, and wants a larger ridge.

    Both ridges are `damping` as a share of mean(diag G_KK), or, with `held_out`, whichever of a grid fits the held-out
    windows best when the others are solved; the answer is then solved on all windows. What was taken is in the
    statistics.
    """
    kept_K = problem.kept_inputs(keep_U)
    if problem.target_OI is None and len(kept_K) == problem.weight_OI.shape[1]:
        return SolveResult(weight_OK=problem.weight_OI, status="ok", statistics={})
    statistics: dict[str, float] = {}
    local, path = problem.damping, problem.damping
    if problem.held_out is not None:
        local, path, statistics["held_out_error"] = _choose_ridges(problem, keep_U)
    corrections = _Corrections(problem, keep_U)
    found = corrections.local(local)
    weight_OK = add_columns(found.weight_OK, problem.weight_OI, kept_K)
    raises, statistics["damping"] = found.num_raises, found.damping
    if problem.target_OI is not None:
        found = corrections.path(path)
        weight_OK += found.weight_OK
        raises, statistics["path_damping"] = max(raises, found.num_raises), found.damping
    statistics["damping_raises"] = float(raises)
    return SolveResult(
        weight_OK=weight_OK.to(problem.weight_OI.dtype),
        status="damping-raised" if raises else "ok",
        statistics=statistics,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Correction:
    """One term and the ridge that it really took. The factor is not part of it: it is as large as the Gram."""

    weight_OK: Tensor
    damping: float
    num_raises: int


class _Corrections:
    """The two terms that `least_squares` adds to W_K, each for any ridge.

    Right sides and the kept square are made anew each time: they take a moment, the factorisation takes the time.
    """

    def __init__(self, problem: LayerProblem, keep_U: Tensor) -> None:
        self.problem = problem
        self.kept_K, self.removed_P = problem.kept_inputs(keep_U), problem.kept_inputs(~keep_U)

    def local(self, damping: float) -> _Correction:
        # Nothing but the product stays while the square is factored.
        missing_OK = times_gram(
            self.problem.weight_OI[:, self.removed_P], self.problem.gram_II, self.removed_P, self.kept_K
        )
        return self._solve(missing_OK, damping)

    def path(self, damping: float) -> _Correction:
        assert self.problem.target_OI is not None
        residual_OK = times_gram(self.problem.weight_OI, self.problem.gram_II, None, self.kept_K).neg_()
        return self._solve(add_columns(residual_OK, self.problem.target_OI, self.kept_K), damping)

    def _solve(self, right_OK: Tensor, damping: float) -> _Correction:
        """R (G_KK + delta I)^-1; the right side R becomes the answer."""
        gram_KK = partial(block_of, self.problem.gram_II, self.kept_K, self.kept_K)
        factor = damped_cholesky(gram_KK, damping, "least squares")
        weight_OK = solved(factor.factor_NN, right_OK)
        return _Correction(weight_OK=weight_OK, damping=factor.damping, num_raises=factor.num_raises)


def _choose_ridges(problem: LayerProblem, keep_U: Tensor) -> tuple[float, float, float]:
    """(local ridge, path ridge, relative held-out error): the first with the path ridge at its middle, then the second.

    One correction at a time, so that two solutions are in memory and not two grids of them.
    """
    held_out = problem.held_out
    assert held_out is not None
    kept_K = problem.kept_inputs(keep_U)
    corrections = _Corrections(problem.without_held_out(), keep_U)
    if held_out.target_energy is None:
        energy = output_energy(problem.weight_OI, held_out.gram_II)
        base_OK = problem.weight_OI[:, kept_K]
    else:
        energy = held_out.target_energy
        middle = corrections.path(_PATH_GRID[len(_PATH_GRID) // 2])
        base_OK = add_columns(middle.weight_OK, problem.weight_OI, kept_K)

    def error(weight_OK: Tensor) -> float:
        return fitting_error(weight_OK, kept_K, problem.weight_OI, held_out.gram_II, held_out.target_OI, energy)

    best, local, local_OK = torch.inf, _LOCAL_GRID[0], torch.zeros(())
    for damping in _LOCAL_GRID:
        trial_OK = corrections.local(damping).weight_OK
        if (found := error(base_OK + trial_OK)) < best:
            best, local, local_OK = found, damping, trial_OK
    path = local
    if held_out.target_OI is not None:
        best = torch.inf
        base_OK = add_columns(local_OK, problem.weight_OI, kept_K)
        for damping in _PATH_GRID:
            if (found := error(corrections.path(damping).weight_OK.add_(base_OK))) < best:
                best, path = found, damping
    return local, path, best / energy if energy > 0 else 0.0
