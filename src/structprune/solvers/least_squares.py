"""Consumer weights on the kept inputs: cut, or re-solved by least squares.

Shape suffixes: O outputs, I inputs, K kept inputs, P removed inputs, U units, R mixtures of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from structprune.linalg.cholesky import damped_cholesky, solved
from structprune.linalg.gram_products import (
    add_columns,
    block_of,
    fitting_error,
    in_float64,
    output_energy,
    strips,
    times_gram,
)
from structprune.rows import Rows
from structprune.solvers.solver import Solver
from structprune.types import LayerProblem, Moments, SolveResult

# Ridges that are tried on held-out windows, as shares of the Gram's mean diagonal.
_LOCAL_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_PATH_GRID = (1e-2, 1e-1, 1.0, 10.0, 100.0)
# A ridge beyond all: no correction.
_NONE = math.inf
SKETCH_ROWS = 128
NUM_TRIALS = len(_LOCAL_GRID) + len(_PATH_GRID)


def mask_only(problem: LayerProblem, keep_U: Tensor) -> SolveResult:
    """Drop the removed columns and leave the others as they are."""
    kept_K = problem.kept_inputs(keep_U)
    return SolveResult(weight_OK=problem.weight_OI[:, kept_K], status="ok", statistics={})


def mean_bias(problem: LayerProblem, keep_U: Tensor) -> SolveResult:
    """Drop the removed columns and add what they give on average: the bias W_P E[x_P] (FLAP, arXiv 2312.11983)."""
    total = problem.total()
    assert total.sum_I is not None
    removed_P = problem.kept_inputs(~keep_U)
    mean_P = total.sum_I[removed_P] / total.num_tokens
    bias_O = problem.weight_OI[:, removed_P].to(torch.float64) @ mean_P
    result = mask_only(problem, keep_U)
    return replace(result, bias_O=bias_O.to(problem.weight_OI.dtype))


def least_squares(problem: LayerProblem, keep_U: Tensor) -> SolveResult:
    """Minimise sum_t |V x_K - y|^2 plus a ridge toward the original weights over V, solved in float64.

    V = W_K + W_P G_PK (G_KK + delta I)^-1 + R_K (G_KK + delta' I)^-1 with R = C - W G and C = sum y x^T. The first
    correction makes up for the removed inputs: for the local target y = W x, where R is zero, it is the restoration of
    FASP (arXiv 2501.09412) with the ridge drawn toward the original weight instead of zero. The second makes up for
    what earlier blocks got wrong; it fits a residual that is mostly noise to these inputs, and wants a larger ridge.

    Both ridges are `damping` as a share of mean(diag G_KK), or, with `held_out`, whichever of a grid fits the held-out
    windows best when the others are solved, each down to no correction at all; the answer is then solved on all
    windows. Those of the grid are shares of each input's own energy, so that one with the energy of thousands does not
    drown the others' correlations. With `held_out_by_text` best is the least relative error |V x_K - y|^2 / |y|^2 of
    the text with the largest one. What was taken is in the statistics; a correction that was not made has none there.
    """
    return _least_squares(problem, keep_U, judged=False)


def judged_least_squares(problem: LayerProblem, keep_U: Tensor) -> SolveResult:
    """Solve like `least_squares`, and report its ridges' relative error on windows not fitted as `held_out_error`."""
    return _least_squares(problem, keep_U, judged=True)


def _least_squares(problem: LayerProblem, keep_U: Tensor, *, judged: bool) -> SolveResult:
    if problem.fit.target_OI is None and bool(keep_U.all()):
        return SolveResult(weight_OK=problem.weight_OI, status="ok", statistics={})
    ridges = _Ridges(local=problem.damping, path=problem.damping, own=False)
    statistics: dict[str, float] = {}
    if problem.held_out is not None:
        ridges = _choose_ridges(problem, keep_U)
        if judged:
            statistics["held_out_error"] = _held_out_error(problem, keep_U, ridges)
    found = _solved(problem, keep_U, ridges)
    if found.taken.local < _NONE:
        statistics["damping"] = found.taken.local
    if problem.fit.target_OI is not None and found.taken.path < _NONE:
        statistics["path_damping"] = found.taken.path
    statistics["damping_raises"] = float(found.num_raises)
    return SolveResult(
        weight_OK=found.weight_OK.to(problem.weight_OI.dtype),
        status="damping-raised" if found.num_raises else "ok",
        statistics=statistics,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ridges:
    """Ridges as shares of the inputs' energy; an infinite one stands for no correction."""

    local: float
    path: float
    """Ridge of the dense path's correction; without effect for the local target."""
    own: bool
    """Whether they are shares of each input's own energy, as those of the grid, or of the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Solution:
    weight_OK: Tensor
    """float64."""
    taken: _Ridges
    """Where the Gram was not definite with what was asked for, more than that."""
    num_raises: int


def _solved(problem: LayerProblem, keep_U: Tensor, ridges: _Ridges) -> _Solution:
    """Compute W_K and both corrections in turn: one right side and one factor are in memory at a time."""
    kept_K, removed_P = problem.kept_inputs(keep_U), problem.kept_inputs(~keep_U)
    total, taken, raises = problem.total(), ridges, 0
    gram_KK = partial(block_of, total.gram_II, kept_K, kept_K)
    if ridges.local < _NONE:
        # Nothing but the product stays while the square is factored.
        right_OK = times_gram(problem.weight_OI[:, removed_P], total.gram_II, removed_P, kept_K)
        factor = damped_cholesky(gram_KK, ridges.local, "least squares", own=ridges.own)
        weight_OK = add_columns(solved(factor.factor_NN, right_OK), problem.weight_OI, kept_K)
        taken, raises = replace(taken, local=factor.damping), factor.num_raises
        del factor, right_OK
    else:
        weight_OK = problem.weight_OI[:, kept_K].to(torch.float64)
    if total.target_OI is not None and ridges.path < _NONE:
        right_OK = times_gram(problem.weight_OI, total.gram_II, None, kept_K).neg_()
        add_columns(right_OK, total.target_OI, kept_K)
        factor = damped_cholesky(gram_KK, ridges.path, "least squares", own=ridges.own)
        weight_OK += solved(factor.factor_NN, right_OK)
        taken, raises = replace(taken, path=factor.damping), max(raises, factor.num_raises)
    return _Solution(weight_OK=weight_OK, taken=taken, num_raises=raises)


def _held_out_error(problem: LayerProblem, keep_U: Tensor, ridges: _Ridges) -> float:
    """Compute the relative error on the held-out windows, that of the text with the largest one if texts are apart."""
    assert problem.held_out is not None
    weight_OK = _solved(problem.without_held_out(), keep_U, ridges).weight_OK
    kept_K = problem.kept_inputs(keep_U)
    parts = problem.held_out_by_text or (problem.held_out,)
    return max(_relative_error(problem, part, weight_OK, kept_K).share for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _RelativeError:
    """A sum of squared errors beside that of the targets."""

    error: float
    energy: float

    @property
    def share(self) -> float:
        return self.error / self.energy if self.energy > 0 else 0.0


def _relative_error(problem: LayerProblem, part: Moments, weight_OK: Tensor, kept_K: Tensor) -> _RelativeError:
    """Compute the error of V over the tokens of `part`, of all outputs."""
    energy = part.target_energy
    if energy is None:
        energy = output_energy(problem.weight_OI, part.gram_II)
    error = fitting_error(weight_OK, kept_K, problem.weight_OI, part.gram_II, part.target_OI, energy)
    return _RelativeError(error=error, energy=energy)


def _choose_ridges(problem: LayerProblem, keep_U: Tensor) -> _Ridges:
    """Choose the best local ridge on the held-out windows with the path's at mid-grid, then the best one of the path.

    No correction is one of the choices for each, and for both together.

    Each trial needs one factorisation, and answers for `SKETCH_ROWS` random mixtures of the outputs instead of all:
    outputs are solved apart and errors are summed over them, so with random signs S the error of S V is that of V in
    the mean (Hutchinson 1990), and all trials are compared on the same mixtures. Leaving outputs out instead would be
    a matter of luck: a few carry most of a residual stream's energy.

    Where texts are apart, what a trial takes off each one's error is from the mixtures, and the error without a
    correction from all outputs: a target's energy does not cancel there.
    """
    fit = problem.fit
    assert problem.held_out is not None
    kept_K, removed_P = problem.kept_inputs(keep_U), problem.kept_inputs(~keep_U)
    signs_RO = _signs(len(problem.weight_OI), problem.seed, problem.device)
    weight_RI = _mixed(signs_RO, problem.weight_OI)
    right_RK = times_gram(weight_RI[:, removed_P], fit.gram_II, removed_P, kept_K)
    residual_RK: Tensor | None = None
    if fit.target_OI is not None:
        residual_RK = times_gram(weight_RI, fit.gram_II, None, kept_K).neg_()
        residual_RK += _mixed(signs_RO, fit.target_OI)[:, kept_K]
    loss = _held_out_loss(problem, kept_K, signs_RO, weight_RI)

    by_local: dict[float, Tensor] = {}
    by_path: dict[float, Tensor] = {}
    for damping in sorted({*_LOCAL_GRID, *(() if residual_RK is None else _PATH_GRID)}):
        gram_KK = partial(block_of, fit.gram_II, kept_K, kept_K)
        factor = damped_cholesky(gram_KK, damping, "least squares", own=True)
        if damping in _LOCAL_GRID:
            by_local[damping] = solved(factor.factor_NN, right_RK.clone())
        if damping in _PATH_GRID and residual_RK is not None:
            by_path[damping] = solved(factor.factor_NN, residual_RK.clone())
        # The next trial makes its own.
        del factor
    base_RK = weight_RI[:, kept_K]
    nothing_RK = torch.zeros((), dtype=torch.float64, device=problem.device)
    by_local[_NONE] = by_path[_NONE] = nothing_RK
    path = _NONE if residual_RK is None else _PATH_GRID[len(_PATH_GRID) // 2]
    middle_RK = base_RK + by_path[path]
    local = min(by_local, key=lambda damping: loss(middle_RK + by_local[damping]))
    losses = {damping: loss(base_RK + by_local[local] + by_path[damping]) for damping in by_path}
    path = min(losses, key=lambda damping: losses[damping])
    if loss(base_RK) <= losses[path]:
        return _Ridges(local=_NONE, path=_NONE, own=True)
    return _Ridges(local=local, path=path, own=True)


def _held_out_loss(
    problem: LayerProblem, kept_K: Tensor, signs_RO: Tensor | None, weight_RI: Tensor
) -> Callable[[Tensor], float]:
    """Return the function of a trial's weight, (R, K), whose least value is best on the held-out windows.

    Of all windows together it is the squared error, a target's energy, equal for all trials, left out. Where texts are
    apart it is the largest relative error of any.
    """
    assert problem.held_out is not None
    together = partial(_mixed_loss, kept_K, signs_RO, weight_RI)
    if not problem.held_out_by_text:
        return together(problem.held_out)
    # One row of the mixtures stands for one of all outputs: in the mean each has the error of all of them.
    num_mixtures = 1 if signs_RO is None else len(signs_RO)
    weight_OK, base_RK = problem.weight_OI[:, kept_K], weight_RI[:, kept_K]
    bases = [_relative_error(problem, part, weight_OK, kept_K) for part in problem.held_out_by_text]
    losses = [together(part) for part in problem.held_out_by_text]
    starts = [loss(base_RK) for loss in losses]

    def worst(weight_RK: Tensor) -> float:
        return max(
            replace(base, error=base.error + (loss(weight_RK) - start) / num_mixtures).share
            for base, loss, start in zip(bases, losses, starts, strict=True)
        )

    return worst


def _mixed_loss(kept_K: Tensor, signs_RO: Tensor | None, weight_RI: Tensor, part: Moments) -> Callable[[Tensor], float]:
    """Return the function of a trial's weight, (R, K), that is its squared error over the tokens of `part`.

    A target's energy, equal for all trials, is left out.
    """
    if part.target_OI is None:
        return lambda weight_RK: fitting_error(weight_RK, kept_K, weight_RI, part.gram_II, None, 0.0)
    wanted_RK = _mixed(signs_RO, part.target_OI)[:, kept_K]
    return lambda weight_RK: output_energy(weight_RK, part.gram_II, kept_K) - 2.0 * float((weight_RK * wanted_RK).sum())


def _signs(num_outputs: int, seed: int, device: torch.device) -> Tensor | None:
    """Draw the signs, (R, O) of -1 and 1; None if there are at most R outputs, which are then used as they are."""
    if num_outputs <= SKETCH_ROWS:
        return None
    # On the host, so that the draw is the same on every device.
    drawn_RO = torch.randint(0, 2, (SKETCH_ROWS, num_outputs), generator=torch.Generator().manual_seed(seed))
    return drawn_RO.to(device, torch.float64).mul_(2).sub_(1)


def _mixed(signs_RO: Tensor | None, values_OI: Rows) -> Tensor:
    """Compute S V in float64, without a float64 copy of V."""
    if signs_RO is None:
        return in_float64(values_OI)
    mixed_RI = signs_RO.new_zeros(len(signs_RO), values_OI.shape[1])
    for part in strips(*values_OI.shape):
        mixed_RI.addmm_(signs_RO[:, part], values_OI[part].to(torch.float64))
    return mixed_RI


MASK_ONLY = Solver(solve=mask_only, reads=set(), changes=set())
BIAS = Solver(solve=mean_bias, reads={"sums"}, changes={"biases"})
LEAST_SQUARES = Solver(solve=least_squares, reads={"gram"}, changes={"consumer"})
