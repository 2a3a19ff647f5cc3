"""One linear map of a block: what was measured of its input -> its weight with zeros, and what that is worth.

Shape suffixes: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from structprune.engine.layerwise.maps import InputSums, moments_of
from structprune.engine.run.context import RunContext
from structprune.errors import NumericalError
from structprune.memory import release_free_memory
from structprune.methods.method import Method
from structprune.patterns import Pattern, as_pattern, sparse
from structprune.recipe.elements import ResolvedElements
from structprune.solvers.elements import PRUNERS, UPDATES
from structprune.solvers.elements.problem import Reads, SharedFactor, SparseProblem
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


def map_patterns(context: RunContext, shares: Sequence[Mapping[str, float]]) -> list[dict[str, Pattern]]:
    """Return the pattern of every map of every block, whose share of zeros is its own."""
    pattern, counts = context.settings(ResolvedElements).pattern, context.method.counts
    return [{name: as_pattern(pattern, share, counts) for name, share in own.items()} for own in shares]


def reads_of(method: Method, solver: str) -> frozenset[Reads]:
    """Say what has to be summed: what the pruner and the update read; a target wants all products."""
    return frozenset({*PRUNERS.get(method.score).reads, *UPDATES.get(solver).reads})


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSums:
    """What is known of the tensor that some maps read, once the ridge of each is chosen, and the patterns to come."""

    patterns: Mapping[str, Pattern]
    """Map -> its pattern, of all maps of the block."""
    total: InputSums | None
    """Sums over all windows; None where the weights alone decide."""
    held_out: InputSums | None
    """Sums over the windows that chose the ridges; None where none did."""
    damping: Mapping[str, float]
    """Map -> its ridge."""
    shared: SharedFactor = field(default_factory=SharedFactor)

    def reordered(self, order_I: Tensor) -> GroupSums:
        """Return the same with the inputs in another order."""
        total, held_out = (None if each is None else each.reordered(order_I) for each in (self.total, self.held_out))
        return replace(self, total=total, held_out=held_out)


def joined_sums(
    context: RunContext, patterns: Mapping[str, Pattern], weights: Mapping[str, Tensor], sums: list[InputSums]
) -> GroupSums:
    """Choose the ridges of some maps by what was summed of their input, and add up all of it.

    `weights`: map -> its weight as it is stored. `sums`: of the fitted windows, then those of others, which are taken
    out of the list, as no second square is kept.
    """
    recipe = context.settings(ResolvedElements)
    damping = _DEFAULT_DAMPING if recipe.damping == "auto" else recipe.damping
    given = dict.fromkeys(weights, damping)
    if not sums:
        return GroupSums(patterns=patterns, total=None, held_out=None, damping=given)
    total = sums.pop(0)
    if not sums:
        return GroupSums(patterns=patterns, total=total, held_out=None, damping=given)
    held_out = reduce(InputSums.plus, sums)
    sums.clear()
    if not (total.moments.num_tokens and held_out.moments.num_tokens):
        # An expert whose tokens are all on one side: nothing can be judged.
        return GroupSums(patterns=patterns, total=total.plus(held_out), held_out=None, damping=given)
    for name, tensor in weights.items():
        problem = _problem(
            context, tensor, name, GroupSums(patterns=patterns, total=total, held_out=None, damping=given)
        )
        given[name] = chosen_damping(problem, moments_of(held_out, name, problem.weight_OI))
        del problem
        release_free_memory()
    joined = total.plus(held_out)
    return GroupSums(patterns=patterns, total=joined, held_out=held_out.packed(), damping=given)


def prune_map(context: RunContext, tensor: Tensor, name: str, sums: GroupSums, seed: int) -> PrunedMap:
    """Choose and solve one map, `tensor` its weight as it is stored.

    Raises NumericalError, for a damaged Gram or an answer that is not finite.
    """
    problem = _problem(context, tensor, name, sums, seed)
    weight_OI, pattern = problem.weight_OI, problem.pattern
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
    release_free_memory()
    if not bool(torch.isfinite(stored_OI).all()):
        raise NumericalError("the pruned weight is not finite", do="raise --damping, or use --output-dtype float32")
    assert pattern.matches(stored_OI), "a mask has the zeros that its pattern wants"
    errors = held_out = None
    # Squares alone do not say what a map's output loses.
    if "gram" in reads_of(context.method, recipe.solver):
        total = problem.moments
        before = squared_error(sparse(weight_OI, keep_OI), problem, total)
        errors = (before, squared_error(stored_OI, problem, total), wanted_energy(problem, total))
        statistics["damping"] = problem.damping
    if sums.held_out is not None:
        others = moments_of(sums.held_out, name, weight_OI)
        held_out = (squared_error(stored_OI, problem, others), wanted_energy(problem, others))
    transposed = context.stock.family.inputs_first
    return PrunedMap(
        weight=(stored_OI.T if transposed else stored_OI).contiguous().cpu(),
        num_zeros=stored_OI.numel() - int(stored_OI.count_nonzero()),
        errors=errors,
        held_out=held_out,
        status=status,
        statistics=statistics,
    )


def _problem(context: RunContext, tensor: Tensor, name: str, sums: GroupSums, seed: int = 0) -> SparseProblem:
    """Build what the pruner sees."""
    weight_OI = (tensor.T if context.stock.family.inputs_first else tensor).to(context.solve_device)
    inputs = weight_OI.shape[1]
    if sums.total is None:
        nothing_II = torch.zeros((), device=weight_OI.device).expand(inputs, inputs)
        moments = Moments(gram_II=nothing_II, num_tokens=1)
    else:
        moments = moments_of(sums.total, name, weight_OI)
    return SparseProblem(
        weight_OI=weight_OI,
        pattern=sums.patterns[name],
        moments=moments,
        damping=sums.damping[name],
        energy_NI=None if sums.total is None else sums.total.energy_NI.to(weight_OI.device),
        seed=seed,
        shared=sums.shared if len(sums.damping) > 1 else None,
    )
