"""One linear map of a block: what was measured of its input -> its weight with zeros, and what that is worth.

Shape suffixes: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from structprune.engine.layerwise.maps import InputSums, moments_of
from structprune.engine.run.context import RunContext
from structprune.errors import NumericalError
from structprune.memory import release_free_memory
from structprune.patterns import Pattern, as_pattern, sparse
from structprune.recipe.elements import ResolvedElements
from structprune.solvers.elements import PRUNERS, UPDATES
from structprune.solvers.elements.problem import Reads, SparseProblem
from structprune.solvers.elements.unit import chosen_damping, squared_error, wanted_energy
from structprune.types import Moments

# Ridge where none is chosen and no window is kept apart.
_DEFAULT_DAMPING = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedMap:
    """One map with its zeros."""

    weight: Tensor
    """The new weight as it is stored: dtype, layout and host."""
    num_zeros: int
    errors: tuple[float, float, float] | None
    """Squared errors of the mask alone and of the answer, and the energy of what is wanted; None without a Gram."""
    held_out: tuple[float, float] | None
    """Squared error of the answer on the windows that chose the ridge, and what is wanted there."""
    status: str
    statistics: dict[str, float]


def pattern_of(context: RunContext) -> Pattern:
    """Return the pattern of a run."""
    recipe = context.settings(ResolvedElements)
    return as_pattern(recipe.pattern, recipe.sparsity, context.method.counts)


def reads_of(context: RunContext) -> frozenset[Reads]:
    """Say what has to be summed: what the pruner and the update read; a target wants all products."""
    recipe = context.settings(ResolvedElements)
    return frozenset({*PRUNERS.get(context.method.score).reads, *UPDATES.get(recipe.solver).reads})


def prune_map(context: RunContext, tensor: Tensor, name: str, sums: Sequence[InputSums], seed: int) -> PrunedMap:
    """Choose and solve one map, `tensor` its weight as it is stored. `sums`: of the fitted windows, then others.

    Raises NumericalError, for a damaged Gram or an answer that is not finite.
    """
    transposed = context.stock.family.inputs_first
    weight_OI = (tensor.T if transposed else tensor).to(context.solve_device)
    problem = _problem(context, weight_OI, name, sums, seed)
    pattern = problem.pattern
    recipe = context.settings(ResolvedElements)
    found = PRUNERS.get(context.method.score).prune(problem)
    release_free_memory()
    answer = UPDATES.get(recipe.solver).solve(problem, found)
    statistics = {**found.statistics, **answer.statistics}
    status = "ok" if found.status == answer.status == "ok" else "damping-raised"
    keep_OI = answer.keep_OI
    del found
    stored_OI = answer.weight_OI.to(tensor.dtype)
    del answer
    if not bool(torch.isfinite(stored_OI).all()):
        raise NumericalError("the pruned weight is not finite", do="raise --damping, or use --output-dtype float32")
    assert pattern.matches(stored_OI), "a mask has the zeros that its pattern wants"
    errors = held_out = None
    # Squares alone do not say what a map's output loses.
    if "gram" in reads_of(context):
        total = problem.total()
        before = squared_error(sparse(weight_OI, keep_OI), problem, total)
        errors = (before, squared_error(stored_OI, problem, total), wanted_energy(problem, total))
        statistics["damping"] = problem.damping
    if problem.held_out is not None:
        held_out = (squared_error(stored_OI, problem, problem.held_out), wanted_energy(problem, problem.held_out))
    return PrunedMap(
        weight=(stored_OI.T if transposed else stored_OI).contiguous().cpu(),
        num_zeros=int((stored_OI == 0).sum()),
        errors=errors,
        held_out=held_out,
        status=status,
        statistics=statistics,
    )


def _problem(context: RunContext, weight_OI: Tensor, name: str, sums: Sequence[InputSums], seed: int) -> SparseProblem:
    """Build what the pruner sees, with the ridge that held-out windows choose if there are any."""
    recipe, inputs = context.settings(ResolvedElements), weight_OI.shape[1]
    damping = _DEFAULT_DAMPING if recipe.damping == "auto" else recipe.damping
    if not sums:
        nothing_II = torch.zeros((), device=weight_OI.device).expand(inputs, inputs)
        fit, held_out = Moments(gram_II=nothing_II, num_tokens=1), None
    else:
        fit, *others = (moments_of(each, name, weight_OI) for each in sums)
        held_out = reduce(Moments.__add__, others) if others else None
    problem = SparseProblem(
        weight_OI=weight_OI,
        pattern=pattern_of(context),
        fit=fit,
        held_out=held_out,
        damping=damping,
        energy_NI=sums[0].energy_NI.to(weight_OI.device) if sums else None,
        seed=seed,
    )
    if held_out is None:
        return problem
    if not (fit.num_tokens and held_out.num_tokens):
        # An expert whose tokens are all on one side: nothing can be judged.
        return replace(problem, fit=fit + held_out, held_out=None)
    return replace(problem, damping=chosen_damping(problem))
