"""The problem with inputs of unit energy: where a ridge means the same for loud and quiet inputs.

With s = sqrt(diag G), A = G / s s^T + delta I and B = W s the problem is that of B with A, and its answer V = B / s.
The ridge is a share of each input's own energy: damping by the mean energy, as most published code has it, drowns quiet
inputs beside a few loud ones, and the answer would change where a channel's scale moves from x to W. An input without
energy gets A_ii = 1 and B_i = 0: it goes first, and where it stays it keeps its weight.

Shape suffixes: I inputs, O outputs, S rows of a strip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structprune.linalg.cholesky import damped_cholesky, solved
from structprune.linalg.gram_products import output_energy, strip_rows, strips
from structprune.patterns import sparse
from structprune.solvers.elements.problem import SparseProblem
from structprune.types import Moments

CANDIDATES = (1e-3, 1e-2, 1e-1)
"""Ridges that held-out windows choose from."""
REFIT_STEPS = 20
"""Steps of conjugate gradients. With inputs of unit energy they end near the exact answer where the Gram is far from
singular; elsewhere they stop before they fit what few tokens say."""
_LEAST_GAIN = 1e-6
# Rows by which the ridge is judged, and that are worked on together: at least so many, and about so many numbers.
_JUDGED_ROWS, _LEAST_ROWS, _GROUP_NUMBERS = 512, 256, 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitProblem:
    """The same problem in unit coordinates, in the dtype that is worked in."""

    gram_II: Tensor
    """A, with the ridge."""
    weight_OI: Tensor
    """B: what is to be met, W s or with a target (C + delta W) H^-1 s. Zero for inputs without energy."""
    scale_I: Tensor
    """s, 1 for inputs without energy."""
    silent_I: Tensor
    """Which inputs are zero at every token."""

    def original(self, unit_OI: Tensor, keep_OI: Tensor, old_OI: Tensor) -> Tensor:
        """Turn an answer back, with +0.0 where nothing stays and the old weight where an input says nothing."""
        weight_OI = unit_OI.div_(self.scale_I.to(unit_OI.dtype))
        if bool(self.silent_I.any()):
            weight_OI[:, self.silent_I] = old_OI[:, self.silent_I].to(unit_OI.dtype)
        return sparse(weight_OI, keep_OI)


def working_dtype(problem: SparseProblem) -> torch.dtype:
    """Return float32, or float64 where the weight has it."""
    return torch.promote_types(problem.weight_OI.dtype, torch.float32)


def scales(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return s in float64, 1 for inputs without energy, and which inputs those are."""
    energy_I = moments.gram_II.diagonal().to(torch.float64)
    silent_I = energy_I <= 0
    return torch.where(silent_I, torch.ones_like(energy_I), energy_I).sqrt(), silent_I


def unit_gram(moments: Moments, dtype: torch.dtype) -> Tensor:
    """Compute G / s s^T with a unit diagonal, a strip of rows at a time: a new matrix."""
    scale_I, _ = scales(moments)
    inputs = len(scale_I)
    gram_II = torch.empty(inputs, inputs, dtype=dtype, device=scale_I.device)
    for part in strips(inputs, inputs):
        rows_SI = moments.gram_II[part].to(torch.float64)
        gram_II[part] = rows_SI.div(scale_I[part, None]).div_(scale_I)
    gram_II.diagonal().fill_(1)
    return gram_II


def damped_gram(problem: SparseProblem) -> Tensor:
    """Compute A, with the ridge, in the dtype that is worked in: a new matrix."""
    gram_II = unit_gram(problem.moments, working_dtype(problem))
    gram_II.diagonal().add_(problem.damping)
    return gram_II


def unit_problem(problem: SparseProblem) -> UnitProblem:
    """Bring the problem to unit coordinates. Raises NumericalError where the Gram stays indefinite."""
    wanted = UnitWeight.of(problem)
    return wanted.problem(damped_gram(problem), slice(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitWeight:
    """B, a few rows at a time: without a target it is made of W whenever it is asked for."""

    source_OI: Tensor
    """W as it is stored, or W_d."""
    dtype: torch.dtype
    scale_I: Tensor
    silent_I: Tensor

    @classmethod
    def of(cls, problem: SparseProblem) -> UnitWeight:
        """Find W_d where there is a target. Raises NumericalError as `wanted_weight` does."""
        local = problem.moments.target_OI is None
        scale_I, silent_I = scales(problem.moments)
        return cls(
            source_OI=problem.weight_OI if local else wanted_weight(problem, problem.damping),
            dtype=working_dtype(problem),
            scale_I=scale_I,
            silent_I=silent_I,
        )

    def rows(self, part: slice) -> Tensor:
        """Return some rows of B, a new tensor."""
        weight_SI = self.source_OI[part].to(self.dtype, copy=True).mul_(self.scale_I.to(self.dtype))
        if bool(self.silent_I.any()):
            weight_SI[:, self.silent_I] = 0
        return weight_SI

    def problem(self, gram_II: Tensor, part: slice) -> UnitProblem:
        """Return the problem of some rows, which do not depend on the others once their mask is known."""
        rows_SI = self.rows(part)
        return UnitProblem(gram_II=gram_II, weight_OI=rows_SI, scale_I=self.scale_I, silent_I=self.silent_I)


def row_groups(outputs: int, inputs: int) -> list[slice]:
    """Return rows that are worked on together: enough for fast products, few enough to stay near the processor."""
    step = max(_LEAST_ROWS, _GROUP_NUMBERS // max(1, inputs))
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]


def refit_rows(problem: SparseProblem, wanted: UnitWeight, keep_OI: Tensor, start_OI: Tensor | None = None) -> Tensor:
    """Refit what stays, some rows after the others, and turn it back: the new weight.

    `start_OI` is in unit coordinates, with the zeros; the answer takes its place.
    """
    gram_II = damped_gram(problem)
    answer_OI = torch.empty(keep_OI.shape, dtype=wanted.dtype, device=gram_II.device) if start_OI is None else start_OI
    for part in row_groups(*keep_OI.shape):
        unit = wanted.problem(gram_II, part)
        found_SI = refit_unit(unit, keep_OI[part], start_OI=None if start_OI is None else start_OI[part])
        answer_OI[part] = unit.original(found_SI, keep_OI[part], problem.weight_OI[part])
    return answer_OI


def refit_bytes(inputs: int, outputs: int) -> int:
    """Count A, the answer and its mask, and ten of a few rows' size: bytes."""
    return inputs**2 * 4 + inputs * outputs * 5 + group_bytes(inputs, outputs, 10)


def group_bytes(inputs: int, outputs: int, count: int) -> int:
    """Count so many float32 matrices of the rows that are worked on together: bytes."""
    rows = row_groups(outputs, inputs)[0]
    return count * 4 * inputs * (rows.stop - rows.start)


def wanted_bytes(inputs: int, outputs: int) -> int:
    """Count the factor and the right side that W_d is made of, in float64, and W_d: bytes on the dense path."""
    return inputs**2 * 8 + inputs * outputs * (2 * 8 + 4)


def wanted_weight(problem: SparseProblem, damping: float) -> Tensor:
    """Return the weight that a solver is to come near to, a new matrix in the dtype that is worked in.

    Without a target that is W. With one it is the answer without zeros, W_d = (C + delta W)(G + delta diag G)^-1, delta
    a share of diag G: tr((V - W_d) H (V - W_d)^T) differs from sum |V x - y|^2 + delta |V - W|^2 by a constant.
    """
    total, dtype = problem.moments, working_dtype(problem)
    if total.target_OI is None:
        return problem.weight_OI.to(dtype, copy=True)
    scale_I, silent_I = scales(total)
    factor_II = damped_cholesky(lambda: unit_gram(total, torch.float64), damping, "target").factor_NN
    right_OI = total.target_OI[:].to(torch.float64, copy=True).div_(scale_I)
    right_OI.add_(problem.weight_OI.to(torch.float64) * scale_I, alpha=damping)
    right_OI[:, silent_I] = 0
    return solved(factor_II, right_OI).div_(scale_I).to(dtype)


def refit_unit(
    unit: UnitProblem,
    keep_OI: Tensor,
    steps: int | None = None,
    start_OI: Tensor | None = None,
    least_gain: float = _LEAST_GAIN,
) -> Tensor:
    """Minimise tr((V - B) A (V - B)^T) over the weights that stay, all rows at once, by conjugate gradients.

    The unit diagonal of A is the preconditioner. `start_OI` has the zeros already. It takes `REFIT_STEPS` steps
    or those given, and ends sooner when one gains less than `least_gain` of what is left.
    """
    answer_OI = sparse(unit.weight_OI, keep_OI) if start_OI is None else start_OI
    away_OI = unit.weight_OI - answer_OI
    rest_OI = away_OI @ unit.gram_II
    left = float((rest_OI * away_OI).sum(dtype=torch.float64))
    del away_OI
    rest_OI = sparse(rest_OI, keep_OI)
    step_OI = rest_OI.clone()
    size_O1 = rest_OI.square().sum(dim=1, keepdim=True)
    for _ in range(REFIT_STEPS if steps is None else steps):
        image_OI = (step_OI @ unit.gram_II).mul_(keep_OI)
        curvature_O1 = (step_OI * image_OI).sum(dim=1, keepdim=True)
        # A row without anything left to gain stays as it is.
        length_O1 = torch.where(curvature_O1 > 0, size_O1 / curvature_O1, 0)
        answer_OI = answer_OI.addcmul_(step_OI, length_O1)
        gain = float((length_O1 * size_O1).sum(dtype=torch.float64))
        left -= gain
        if gain <= least_gain * left:
            break
        rest_OI.addcmul_(image_OI, length_O1, value=-1)
        before_O1, size_O1 = size_O1, rest_OI.square().sum(dim=1, keepdim=True)
        step_OI.mul_(torch.where(before_O1 > 0, size_O1 / before_O1, 0)).add_(rest_OI)
    return answer_OI


def squared_error(weight_OI: Tensor, problem: SparseProblem, moments: Moments) -> float:
    """Compute the sum over the tokens of |V x - y|^2, without any ridge: what methods are compared by.

    In the dtype that is worked in, which is no narrower than the sums; from the difference of the weights where it can
    be, so that nothing cancels.
    """
    dtype, total = working_dtype(problem), 0.0
    for part in _judged_together(*weight_OI.shape):
        weight_SI = weight_OI[part].to(dtype)
        if moments.target_OI is None:
            total += output_energy(weight_SI - problem.weight_OI[part].to(dtype), moments.gram_II, dtype=dtype)
        else:
            # A small difference of large numbers.
            met = float((weight_SI.to(torch.float64) * moments.target_OI[part]).sum())
            total += output_energy(weight_SI, moments.gram_II) - 2 * met
    assert moments.target_OI is None or moments.target_energy is not None
    return max(0.0, total + (moments.target_energy or 0.0))


def wanted_energy(problem: SparseProblem, moments: Moments) -> float:
    """Compute the sum over the tokens of |y|^2."""
    if moments.target_energy is not None:
        return moments.target_energy
    dtype, parts = working_dtype(problem), _judged_together(*problem.weight_OI.shape)
    return sum(output_energy(problem.weight_OI[part], moments.gram_II, dtype=dtype) for part in parts)


def _judged_together(outputs: int, inputs: int) -> list[slice]:
    """Return rows whose errors are computed together: many, as the Gram is read in strips for each."""
    step = max(1024, 2**22 // max(1, inputs))
    return [slice(start, start + step) for start in range(0, outputs, step)]


def judged_bytes(inputs: int, outputs: int) -> int:
    """Count a few rows of the weight and their difference in float64, and products with a strip of the Gram: bytes."""
    rows = min(outputs, _judged_together(outputs, inputs)[0].stop)
    strip = strip_rows(inputs, inputs)
    return rows * inputs * (8 + 8 + 4) + strip * (inputs * (4 + 8) + rows * 8 * 3)


def relative_error(weight_OI: Tensor, problem: SparseProblem, moments: Moments) -> float:
    """Divide the squared error by the energy of what is wanted; 0 where nothing is."""
    wanted = wanted_energy(problem, moments)
    return squared_error(weight_OI, problem, moments) / wanted if wanted > 0 else 0.0


def chosen_damping(problem: SparseProblem, held_out: Moments) -> float:
    """Choose the ridge that held-out windows like best; `problem` has the sums of the other ones.

    Each candidate refits the weights that stay by Wanda's score on the fitted windows: the ridge is a matter of how
    much the sums are to be believed, and a solver of its own for each would take three times as long. Of many rows some
    hundred, evenly spaced, tell.
    """
    rows = _some(len(problem.weight_OI))
    problem = replace(problem, weight_OI=problem.weight_OI[rows], moments=_some_rows(problem.moments, rows))
    held_out = _some_rows(held_out, rows)
    scale_I, _ = scales(problem.moments)
    keep_OI = problem.pattern.keep_largest(problem.weight_OI.abs().to(torch.float64) * scale_I)
    errors: dict[float, float] = {}
    for damping in CANDIDATES:
        trial = replace(problem, damping=damping)
        unit = unit_problem(trial)
        weight_OI = unit.original(refit_unit(unit, keep_OI), keep_OI, problem.weight_OI)
        errors[damping] = squared_error(weight_OI, trial, held_out)
        del unit
    return min(errors, key=lambda damping: errors[damping])


def _some(outputs: int) -> slice:
    return slice(None, None, -(-outputs // _JUDGED_ROWS))


def choice_bytes(inputs: int, outputs: int) -> int:
    """Count A and five of the judged rows' size in float64 where the ridge is chosen, beside both sums: bytes."""
    return inputs**2 * 4 + len(range(outputs)[_some(outputs)]) * inputs * 5 * 8


def _some_rows(moments: Moments, rows: slice) -> Moments:
    """Take some outputs of the map. Errors then lack the other outputs' share of |y|^2, no more than a constant."""
    return replace(moments, target_OI=None if moments.target_OI is None else moments.target_OI[rows])
