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
from structprune.linalg.gram_products import output_energy, strips
from structprune.patterns import sparse
from structprune.solvers.elements.problem import SparseProblem
from structprune.types import Moments

CANDIDATES = (1e-3, 1e-2, 1e-1)
"""Ridges that held-out windows choose from."""
REFIT_STEPS = 20
"""Steps of conjugate gradients. With inputs of unit energy they end near the exact answer where the Gram is far from
singular; elsewhere they stop before they fit what few tokens say."""
# Rows by which the ridge is judged.
_JUDGED_ROWS = 512


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

    def original(self, unit_OI: Tensor, keep_OI: Tensor, problem: SparseProblem) -> Tensor:
        """Turn an answer back, with +0.0 where nothing stays and the old weight where an input says nothing."""
        weight_OI = unit_OI.div_(self.scale_I.to(unit_OI.dtype))
        if bool(self.silent_I.any()):
            weight_OI[:, self.silent_I] = problem.weight_OI[:, self.silent_I].to(unit_OI.dtype)
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


def unit_problem(problem: SparseProblem, damping: float | None = None) -> UnitProblem:
    """Bring the sums over all tokens to unit coordinates. Raises NumericalError where the Gram stays indefinite."""
    total, dtype = problem.total(), working_dtype(problem)
    damping = problem.damping if damping is None else damping
    scale_I, silent_I = scales(total)
    weight_OI = wanted_weight(problem, damping).to(dtype).mul_(scale_I.to(dtype))
    weight_OI[:, silent_I] = 0
    gram_II = unit_gram(total, dtype)
    gram_II.diagonal().add_(damping)
    return UnitProblem(gram_II=gram_II, weight_OI=weight_OI, scale_I=scale_I, silent_I=silent_I)


def wanted_weight(problem: SparseProblem, damping: float) -> Tensor:
    """Return the weight that a solver is to come near to, a new matrix in the dtype that is worked in.

    Without a target that is W. With one it is the answer without zeros, W_d = (C + delta W)(G + delta diag G)^-1, delta
    a share of diag G: tr((V - W_d) H (V - W_d)^T) differs from sum |V x - y|^2 + delta |V - W|^2 by a constant.
    """
    total, dtype = problem.total(), working_dtype(problem)
    if total.target_OI is None:
        return problem.weight_OI.to(dtype, copy=True)
    scale_I, silent_I = scales(total)
    factor_II = damped_cholesky(lambda: unit_gram(total, torch.float64), damping, "target").factor_NN
    right_OI = total.target_OI[:].to(torch.float64, copy=True).div_(scale_I)
    right_OI.add_(problem.weight_OI.to(torch.float64) * scale_I, alpha=damping)
    right_OI[:, silent_I] = 0
    return solved(factor_II, right_OI).div_(scale_I).to(dtype)


def refit_unit(unit: UnitProblem, keep_OI: Tensor, steps: int = REFIT_STEPS, start_OI: Tensor | None = None) -> Tensor:
    """Minimise tr((V - B) A (V - B)^T) over the weights that stay, all rows at once, by conjugate gradients.

    The unit diagonal of A is the preconditioner. `start_OI` has the zeros already.
    """
    answer_OI = sparse(unit.weight_OI, keep_OI) if start_OI is None else start_OI
    rest_OI = sparse((unit.weight_OI - answer_OI) @ unit.gram_II, keep_OI)
    step_OI = rest_OI.clone()
    size_O1 = rest_OI.square().sum(dim=1, keepdim=True)
    for _ in range(steps):
        image_OI = sparse(step_OI @ unit.gram_II, keep_OI)
        curvature_O1 = (step_OI * image_OI).sum(dim=1, keepdim=True)
        # A row without anything left to gain stays as it is.
        length_O1 = torch.where(curvature_O1 > 0, size_O1 / curvature_O1, 0)
        answer_OI = answer_OI.addcmul_(step_OI, length_O1)
        rest_OI.addcmul_(image_OI, length_O1, value=-1)
        before_O1, size_O1 = size_O1, rest_OI.square().sum(dim=1, keepdim=True)
        step_OI.mul_(torch.where(before_O1 > 0, size_O1 / before_O1, 0)).add_(rest_OI)
    return answer_OI


def squared_error(weight_OI: Tensor, problem: SparseProblem, moments: Moments) -> float:
    """Compute the sum over the tokens of |V x - y|^2, without any ridge, in float64: what methods are compared by."""
    if moments.target_OI is None:
        difference_OI = weight_OI.to(torch.float64, copy=True)
        for part in strips(*difference_OI.shape):
            difference_OI[part] -= problem.weight_OI[part].to(torch.float64)
        return max(0.0, output_energy(difference_OI, moments.gram_II))
    met = 0.0
    for part in strips(*weight_OI.shape):
        met += float((weight_OI[part].to(torch.float64) * moments.target_OI[part]).sum())
    assert moments.target_energy is not None
    return max(0.0, moments.target_energy + output_energy(weight_OI, moments.gram_II) - 2 * met)


def wanted_energy(problem: SparseProblem, moments: Moments) -> float:
    """Compute the sum over the tokens of |y|^2."""
    if moments.target_energy is not None:
        return moments.target_energy
    return output_energy(problem.weight_OI, moments.gram_II)


def relative_error(weight_OI: Tensor, problem: SparseProblem, moments: Moments) -> float:
    """Divide the squared error by the energy of what is wanted; 0 where nothing is."""
    wanted = wanted_energy(problem, moments)
    return squared_error(weight_OI, problem, moments) / wanted if wanted > 0 else 0.0


def chosen_damping(problem: SparseProblem) -> float:
    """Choose the ridge that held-out windows like best.

    Each candidate refits the weights that stay by Wanda's score on the fitted windows: the ridge is a matter of how
    much the sums are to be believed, and a solver of its own for each would take three times as long. Of many rows some
    hundred, evenly spaced, tell.
    """
    assert problem.held_out is not None
    rows = slice(None, None, -(-len(problem.weight_OI) // _JUDGED_ROWS))
    part = _some_rows(problem, rows)
    assert part.held_out is not None
    scale_I, _ = scales(part.fit)
    keep_OI = part.pattern.keep_largest(part.weight_OI.abs().to(torch.float64) * scale_I)
    errors: dict[float, float] = {}
    for damping in CANDIDATES:
        unit = unit_problem(part.fitted(), damping)
        weight_OI = unit.original(refit_unit(unit, keep_OI), keep_OI, part)
        errors[damping] = squared_error(weight_OI, part, part.held_out)
        del unit
    return min(errors, key=lambda damping: errors[damping])


def _some_rows(problem: SparseProblem, rows: slice) -> SparseProblem:
    """Take some outputs of the map. Errors then lack the other outputs' share of |y|^2 no more than a constant."""

    def part(moments: Moments) -> Moments:
        return replace(moments, target_OI=None if moments.target_OI is None else moments.target_OI[rows])

    assert problem.held_out is not None
    weight_OI = problem.weight_OI[rows]
    return replace(problem, weight_OI=weight_OI, fit=part(problem.fit), held_out=part(problem.held_out))
