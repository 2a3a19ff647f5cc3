"""Which units stay, by a growing penalty that drives the others to zero (reconstructed after SPAP).

Shape suffixes: U units, O outputs, I inputs, P partitions.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from structprune.linalg.cholesky import damped_cholesky, solved
from structprune.linalg.gram_products import column_energies, in_float64
from structprune.scores.score import Selector, Workspace
from structprune.scores.selection import keep_best
from structprune.types import LayerProblem

_FIRST_PENALTY = 1e-3
_GROWTH = 1.3
_NUM_ITERATIONS = 40
# What is left of the units to go, as a share of all, when there is nothing more to decide.
_NEGLIGIBLE = 1e-8
_LARGEST_WEIGHT = 1e6


def keep_penalty(problem: LayerProblem, num_keep: int) -> Tensor:
    """Mask of the units that are left when the penalty has driven the others to zero, shape (U,).

    min over V of 1/2 |V x - W x|^2 + rho/2 sum_j s_j w_j |V_j|^2 with w_j = G_jj, while rho grows:
    V = W H (H + rho diag(s w))^-1. With e_j = w_j |V_j|^2 the energy of a unit and e that of the unit at the boundary
    between those that go and those that stay, s_j = e / e_j. SPAP (arXiv 2505.03373) names a penalty method for a
    mixed-integer model; all else here is reconstructed. With s in {0, 1}, as that model has it, the first decision is
    the last: what is penalised shrinks, and stays among the smallest (docs/methods/spap.md).
    With relaxed s units change sides.
    """
    num_remove = problem.num_units - num_keep
    if num_remove == 0:
        return torch.ones(problem.num_units, dtype=torch.bool, device=problem.device)
    damped_II = in_float64(problem.total().gram_II)
    scale_I = damped_II.diagonal().clone()
    damped_II.diagonal().add_(damped_cholesky(damped_II, problem.damping, "penalty method").delta)
    value_OI = problem.weight_OI.to(torch.float64)
    right_OI = value_OI @ damped_II

    def energy(value_OI: Tensor) -> Tensor:
        energy_I = scale_I * column_energies(value_OI)
        return energy_I.reshape(problem.num_units, problem.width).sum(dim=1)

    energy_U = energy(value_OI)
    penalty = _FIRST_PENALTY
    for _ in range(_NUM_ITERATIONS):
        energy_PU = energy_U.reshape(problem.partitions, -1)
        ascending_PU = energy_PU.sort(dim=1).values
        leaving_PU = ascending_PU[:, : num_remove // problem.partitions]
        if float(leaving_PU.sum()) <= _NEGLIGIBLE * float(energy_PU.sum()):
            break
        share_U = (leaving_PU[:, -1:] / energy_PU).flatten()
        share_U = share_U.clamp(max=_LARGEST_WEIGHT).nan_to_num(posinf=_LARGEST_WEIGHT)
        shift_I = penalty * scale_I * share_U.repeat_interleave(problem.width)
        # Damped already: positive definite, so the factorisation takes no further ridge.
        factor = damped_cholesky(partial(_shifted, damped_II, shift_I), 0.0, "penalty method")
        energy_U = energy(solved(factor.factor_NN, right_OI.clone()))
        # The next one would be made beside it.
        del factor
        penalty *= _GROWTH
    return keep_best(energy_U, num_keep, problem.partitions)


def _shifted(matrix_II: Tensor, shift_I: Tensor) -> Tensor:
    shifted_II = matrix_II.clone()
    shifted_II.diagonal().add_(shift_I)
    return shifted_II


PENALTY = Selector(keep=keep_penalty, reads={"gram"}, workspace=Workspace(grams=2, consumers=4))
