"""ALPS: the mask and the weights together, by ADMM (arXiv 2406.07831, algorithm 1 and section 3.2).

In unit coordinates, A the damped Gram and B0 the wanted weight, min |.|_A^2 over V = D with zeros in D:

    B <- (B0 A - V + rho D)(A + rho I)^-1;     D <- the largest of B + V / rho;     V <- V + rho (B - D)

rho grows the faster the more of the mask still changes; when nothing changes the mask is that of B, and conjugate
gradients refit the weights on it. Published code keeps the eigenvectors of A; here A + rho I is inverted anew for each
of about ten values of rho, with the same iterates and a third of the memory.

Shape suffixes: I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.errors import NumericalError
from structprune.linalg.cholesky import factored, inverted
from structprune.patterns import Pattern, sparse
from structprune.solvers.elements.problem import Pruner, SparseProblem, SparseSolution
from structprune.solvers.elements.unit import REFIT_STEPS, UnitProblem, refit_unit, unit_problem

_RHO, _MOST_RHO = 0.1, 1e6
_EVERY, _MOST_STEPS, _SETTLED_AFTER, _SETTLED = 3, 300, 30, 3e-4


@dataclass(slots=True, kw_only=True)
class _State:
    """Where the iteration is."""

    pruned_OI: Tensor
    """D."""
    dual_OI: Tensor
    """V."""
    keep_OI: Tensor
    """Mask of D at the last check."""
    rho: float = _RHO
    raised: bool = False


def prune_alps(problem: SparseProblem) -> SparseSolution:
    """Choose and solve one matrix. Raises NumericalError for a Gram that is not finite."""
    unit, pattern = unit_problem(problem), problem.pattern
    right_OI = unit.weight_OI @ unit.gram_II
    start_OI = _projected(unit.weight_OI, pattern)
    state = _State(pruned_OI=start_OI, dual_OI=torch.zeros_like(start_OI), keep_OI=start_OI != 0)
    del start_OI
    inverse_II = _inverse(unit.gram_II, state.rho)
    steps, free_OI = 0, unit.weight_OI
    for steps in range(1, _MOST_STEPS + 1):
        free_OI = (right_OI - state.dual_OI).add_(state.pruned_OI, alpha=state.rho) @ inverse_II
        state.pruned_OI = _projected(free_OI + state.dual_OI / state.rho, pattern)
        state.dual_OI.add_(free_OI - state.pruned_OI, alpha=state.rho)
        if steps % _EVERY:
            continue
        before = state.rho
        if _checked(state, unit, pattern, steps):
            break
        if state.rho != before:
            inverse_II = _inverse(unit.gram_II, state.rho)
    del inverse_II, right_OI
    keep_OI = pattern.keep_largest(free_OI.abs())
    answer_OI = refit_unit(unit, keep_OI, REFIT_STEPS, sparse(free_OI, keep_OI))
    return SparseSolution(
        weight_OI=unit.original(answer_OI, keep_OI, problem), keep_OI=keep_OI, statistics={"steps": float(steps)}
    )


def _projected(weight_OI: Tensor, pattern: Pattern) -> Tensor:
    return sparse(weight_OI, pattern.keep_largest(weight_OI.abs()))


def _inverse(gram_II: Tensor, rho: float) -> Tensor:
    """Invert A + rho I, whose condition is at most I / rho."""
    shifted_II = gram_II.clone()
    shifted_II.diagonal().add_(rho)
    factor_II, definite = factored(shifted_II)
    if not definite:
        raise NumericalError("the Gram matrix is indefinite", got=f"rho {rho:g}", do="raise --damping")
    return inverted(factor_II)


def _checked(state: _State, unit: UnitProblem, pattern: Pattern, steps: int) -> bool:
    """Set rho by how much of the mask has changed since the last check; True where the iteration is at its end."""
    keep_OI = state.pruned_OI != 0
    changed, kept = int((keep_OI != state.keep_OI).sum()), max(1, int(keep_OI.sum()))
    state.keep_OI = keep_OI
    if steps >= _SETTLED_AFTER and changed / kept < _SETTLED:
        return True
    if changed == 0 and state.raised:
        return True
    if changed / kept > 0.005 or (changed and state.raised):
        factor = 1.3 if changed / kept > 0.1 else 1.2 if changed / kept > 0.005 else 1.1
        state.rho, state.raised = min(_MOST_RHO, state.rho * factor), True
        return False
    state.rho /= 5
    if changed:
        # It began too high: from the start again.
        state.pruned_OI = _projected(unit.weight_OI, pattern)
        state.dual_OI.zero_()
        state.keep_OI = state.pruned_OI != 0
    return False


def workspace(inputs: int, outputs: int) -> int:
    """Count A, the shifted one and its inverse, the target's factor, and ten of the weight's size with masks: bytes."""
    return inputs**2 * (3 * 4 + 8) + inputs * outputs * (10 * 4 + 12 + 3)


ALPS = Pruner(prune=prune_alps, reads=frozenset({"gram"}), workspace=workspace)
