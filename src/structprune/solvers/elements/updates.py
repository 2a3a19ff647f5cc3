"""What becomes of the weights that stay, whatever chose them.

Shape suffixes: I inputs, O outputs.
"""

from __future__ import annotations

from structprune.patterns import sparse
from structprune.solvers.elements import blockwise
from structprune.solvers.elements.problem import SparseProblem, SparseSolution, Update
from structprune.solvers.elements.unit import UnitWeight, refit_bytes, refit_rows, working_dtype


def _as_they_are(problem: SparseProblem, solution: SparseSolution) -> SparseSolution:
    """Leave what the pruner has left."""
    return solution


def _mask_only(problem: SparseProblem, solution: SparseSolution) -> SparseSolution:
    """Go back to the dense model's weights."""
    weight_OI = sparse(problem.weight_OI.to(working_dtype(problem)), solution.keep_OI)
    return SparseSolution(weight_OI=weight_OI, keep_OI=solution.keep_OI, status=solution.status)


def _sweep(problem: SparseProblem, solution: SparseSolution) -> SparseSolution:
    """Remove what goes input after input, as SparseGPT does, each made up for by the inputs behind it."""
    return blockwise.prune_blockwise(problem, blockwise.SPARSEGPT_CHOICE, "in turn", keep_OI=solution.keep_OI)


def refit(problem: SparseProblem, solution: SparseSolution) -> SparseSolution:
    """Solve for the weights that stay by least squares."""
    weight_OI = refit_rows(problem, UnitWeight.of(problem), solution.keep_OI)
    return SparseSolution(weight_OI=weight_OI, keep_OI=solution.keep_OI, status=solution.status)


OWN = Update(solve=_as_they_are, reads=frozenset(), workspace=lambda inputs, outputs: 0)
MASK_ONLY = Update(solve=_mask_only, reads=frozenset(), workspace=lambda inputs, outputs: 8 * inputs * outputs)
SWEEP = Update(solve=_sweep, reads=frozenset({"gram"}), workspace=blockwise.workspace, shares=blockwise.shares)
REFIT = Update(solve=refit, reads=frozenset({"gram"}), workspace=refit_bytes)
