"""What a run that removes units is to do: which groups are in scope, and what the recipe leaves to the method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from structprune.allocation import ALLOCATORS
from structprune.architectures.families.common import CHANNELS_ENTRY, VALUES_ENTRY
from structprune.architectures.modeling.removed import check_can_go
from structprune.architectures.modeling.value_channels import has_narrow_values
from structprune.architectures.stock.model import StockModel
from structprune.engine.pipelines.decided import allocator_for, with_limits, with_widths
from structprune.engine.pipelines.gated_settings import check_gates, planned_gates
from structprune.engine.pipelines.search_settings import check_search, planned_search, search_of, search_settings
from structprune.engine.pipelines.units_checks import (
    check_allocator,
    check_biases,
    check_correlations,
    check_iterative,
    check_path,
    check_score,
    check_solver,
    check_value_channels,
)
from structprune.engine.pipelines.wrapped import evenly_inside
from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.widths import are_even, binding_limits
from structprune.engine.streaming.activation_cache import cacheable
from structprune.errors import InputError, UnsupportedError
from structprune.exporters.depth import check_numbers_can_change
from structprune.kinds import SCOPES, Structure
from structprune.methods.method import Method, SensitivityKind
from structprune.recipe import default_sensitivity_samples
from structprune.recipe.repaired import objective_of
from structprune.recipe.units import ResolvedUnits, Target, UnitsRecipe
from structprune.solvers import SOLVERS
from structprune.types import UnitGroup, UnitKind

_NARROW = 4096
# Where nothing is to be compared, or to be made up for.
_EVEN_ALLOCATOR = "uniform"
_IDLE_SOLVER = "mask-only"


def unit_settings(
    recipe: UnitsRecipe, method: Method, stock: StockModel
) -> tuple[ResolvedUnits, tuple[UnitGroup, ...]]:
    """Fill every entry of the recipe, and find the groups in scope.

    Raises UnsupportedError for combinations without a meaning, InputError for numbers that cannot be kept.
    """
    groups = _groups_in_scope(method, recipe, stock)
    if recipe.widths.blocks:
        recipe = with_widths(recipe, _kinds(groups), stock)
    recipe = evenly_inside(recipe, groups, stock)
    check_biases(recipe.solver or method.solver, groups, stock.family.name)
    lost = _may_be_lost(recipe, groups)
    check_can_go(stock.config, stock.family, lost)
    if "attention" in lost:
        check_numbers_can_change(stock.family)
    default = math.lcm(*(g.multiple_of for g in groups)) if recipe.widths.blocks else _default_multiple(groups)
    multiple_of = _checked_multiple(recipe.multiple_of or default, groups, stock)
    resolved = _resolved(recipe, method, stock, groups, multiple_of)
    limits = binding_limits(stock, resolved, _kinds(groups))
    if recipe.allocator is None and recipe.structure != Structure.UNIFORM and (allocator := allocator_for(limits)):
        asked = recipe.model_copy(update={"allocator": allocator})
        resolved = _resolved(asked, method, stock, groups, multiple_of)
    resolved = with_limits(resolved, limits, recipe, stock, _kinds(groups))
    check_gates(resolved, method, groups)
    for group in groups:
        if SOLVERS.get(resolved.solver).propose is not None and group.kind == "mlp":
            check_iterative(resolved.solver, group, stock.family.name)
    return resolved, groups


def _may_be_lost(recipe: UnitsRecipe, groups: Sequence[UnitGroup]) -> set[UnitKind]:
    """Return the kinds of sublayers that some block may lose as a whole."""
    if recipe.widths.blocks:
        return {kind for block in recipe.widths.blocks.values() for kind, count in block.items() if count == 0}
    return {group.kind for group in groups} if recipe.allow_block_removal else set()


def _kinds(groups: Sequence[UnitGroup]) -> tuple[UnitKind, ...]:
    return tuple(dict.fromkeys(group.kind for group in groups))


def units_need_windows(recipe: ResolvedUnits, method: Method) -> bool:
    """Return whether units are chosen, or weights solved, by what windows measure."""
    return method.needs_statistics or method.sensitivity_for(recipe.allocator) is not SensitivityKind.NONE


def units_request(request: PlanRequest, recipe: ResolvedUnits, method: Method, stock: StockModel) -> PlanRequest:
    """Add what the planner has to know: what is measured first, what is held beside a block, and what is solved."""
    sensitivity = method.sensitivity_for(recipe.allocator)
    kinds = _kinds(request.groups)
    solver = SOLVERS.get(recipe.solver)
    return replace(
        request,
        needs_statistics=method.needs_statistics or sensitivity in (SensitivityKind.LOSS, SensitivityKind.SCORES),
        needs_sensitivity=sensitivity is SensitivityKind.LOSS,
        needs_scores=sensitivity is SensitivityKind.SCORES,
        needs_weight_gradients=sensitivity is SensitivityKind.TAYLOR,
        follows_dense=recipe.follows_dense,
        num_rehearsals=recipe.outer_iterations,
        chooses_ridge=recipe.chooses_ridge,
        held_out_texts=len(recipe.texts) if objective_of(recipe).by_text else 1,
        score=recipe.score,
        solves="consumer" in solver.changes,
        num_latents=solver.num_latents,
        gates=planned_gates(recipe),
        search=planned_search(request, recipe),
        # Where blocks are pruned sublayer by sublayer, from sums of every sublayer's inputs.
        cacheable=cacheable(stock, kinds, recipe.solver) if method.needs_statistics else (),
    )


def _checked_multiple(multiple_of: int, groups: Sequence[UnitGroup], stock: StockModel) -> int:
    for group in groups:
        if multiple_of % group.multiple_of:
            raise UnsupportedError(
                f"stock kernels for {stock.family.name} take other widths only",
                got=f"--multiple-of {multiple_of}",
                wanted=f"a multiple of {group.multiple_of}",
            )
    return multiple_of


def _resolved(
    recipe: UnitsRecipe, method: Method, stock: StockModel, groups: tuple[UnitGroup, ...], multiple_of: int
) -> ResolvedUnits:
    """Fill what the recipe leaves to the method. Raises UnsupportedError for combinations without a meaning.

    `groups` are those in scope.
    """
    narrows = {VALUES_ENTRY, CHANNELS_ENTRY} & {name for group in groups for name in group.config_fields}
    evenly, search = recipe.structure == Structure.UNIFORM, search_of(recipe)
    starts_evenly = evenly or (search is not None and search.even)
    allocator = ALLOCATORS.check(recipe.allocator or (_EVEN_ALLOCATOR if starts_evenly else method.allocator))
    entry = ALLOCATORS.get(allocator)
    entry.check(allocator)
    if entry.reads_widths and not recipe.widths.blocks:
        raise InputError(f"allocator {allocator!r} has nothing to read", wanted="--widths FILE")
    even = entry.even or (entry.reads_widths and are_even(stock, _kinds(groups), recipe.widths))
    even = even and (search is None or search.even)
    temperature = method.temperature if allocator == method.allocator else 0.0
    target = _checked_target(recipe, method, groups)
    protect_first, protect_last = _protected_blocks(recipe, method, len(stock.layout.blocks))
    score = check_score(recipe.score or method.score, method)
    if VALUES_ENTRY in narrows:
        check_value_channels(recipe, score)
    if CHANNELS_ENTRY in narrows and evenly:
        raise UnsupportedError(
            f"the width of MLPs follows from the hidden size in stock {stock.family.name}, so no stock config says it",
            got="--structure uniform",
            wanted="--structure per-layer, which comes with a modelling file",
        )
    solver = SOLVERS.check(recipe.solver or method.solver)
    if "biases" in SOLVERS.get(solver).changes and recipe.sparsity == 0:
        # Nothing is missing, so nothing is added.
        solver = _IDLE_SOLVER
    damping = recipe.damping or method.damping
    check_solver(recipe, method, solver, damping)
    check_correlations(recipe, method, score, allocator)
    if recipe.max_retention < recipe.min_retention:
        raise InputError(
            "no share of a block's units is within the bounds",
            got=f"--min-retention {recipe.min_retention:g}, --max-retention {recipe.max_retention:g}",
            wanted="the first at most the second",
        )
    uneven = _has_uneven_blocks(recipe, stock, protect_first + protect_last)
    if not even and evenly:
        gives = f"allocator {allocator!r}" if search is None else f"search {recipe.search!r} from {allocator!r}"
        raise UnsupportedError(
            f"{gives} gives every block its own width",
            wanted=f"--structure {Structure.PER_LAYER} or --allocator {_EVEN_ALLOCATOR}",
        )
    check_allocator(recipe, method, score, allocator)
    check_path(method, solver, target)
    if search is not None:
        check_search(recipe, method, allocator)
    return ResolvedUnits.of(
        recipe,
        multiple_of=multiple_of,
        head_units=stock.head_units,
        allocator=allocator,
        temperature=temperature if recipe.temperature is None else recipe.temperature,
        target=target,
        structure=recipe.structure or (Structure.UNIFORM if even and not (uneven or narrows) else Structure.PER_LAYER),
        damping=damping,
        shrinkage=method.shrinkage if recipe.shrinkage is None else recipe.shrinkage,
        score=score,
        solver=solver,
        protect_first=protect_first,
        protect_last=protect_last,
        sensitivity_samples=recipe.sensitivity_samples or default_sensitivity_samples(recipe.seq_len),
        **search_settings(recipe, search),
    )


def _checked_target(recipe: UnitsRecipe, method: Method, groups: Sequence[UnitGroup]) -> Target:
    """Decide what the solver fits. Raises UnsupportedError where the experts of a mixture have no such target."""
    mixture = any(group.expert is not None for group in groups)
    # Nothing removed leaves nothing to correct: the dense path is the model's own.
    target = (recipe.target or ("local" if mixture else method.target)) if recipe.sparsity > 0 else "local"
    if mixture and target == "dense-path":
        raise UnsupportedError(
            "experts share what they add to the stream, so none has a target of its own on the dense path",
            got="--target dense-path",
            wanted="--target local",
        )
    return target


def _has_uneven_blocks(recipe: UnitsRecipe, stock: StockModel, num_protected: int) -> bool:
    """Say whether blocks keep different widths whatever the allocator. Raises UnsupportedError if one was asked for."""
    uneven = not stock.has_even_blocks
    if recipe.structure == Structure.UNIFORM:
        wanted = f"--structure {Structure.PER_LAYER}"
        if num_protected:
            raise UnsupportedError("protected blocks keep another width than the others", wanted=wanted)
        if uneven:
            raise UnsupportedError("the source's blocks have different widths", wanted=wanted)
    return uneven or num_protected > 0


def _protected_blocks(recipe: UnitsRecipe, method: Method, num_blocks: int) -> tuple[int, int]:
    """Count the blocks at the start and at the end that lose nothing: the recipe's numbers, else the method's.

    The method protects none where nothing is removed, or where uniform widths were asked for. Raises InputError if none
    is left.
    """
    default = (0, 0)
    if recipe.sparsity > 0 and recipe.structure != Structure.UNIFORM:
        default = method.protected_blocks(num_blocks)
    asked = (recipe.protect_first, recipe.protect_last)
    first, last = (value if value is not None else other for value, other in zip(asked, default, strict=True))
    if first + last and first + last >= num_blocks:
        raise InputError(
            "every block is protected",
            got=f"--protect-first {first}, --protect-last {last}",
            wanted=f"fewer than {num_blocks} together",
        )
    return first, last


def _default_multiple(groups: tuple[UnitGroup, ...]) -> int:
    """Return 32 for widths below 4096, else 128: rows that the kernels of CPUs and GPUs like."""
    return 32 if max((group.num_units * group.width for group in groups), default=0) < _NARROW else 128


def _groups_in_scope(method: Method, recipe: UnitsRecipe, stock: StockModel) -> tuple[UnitGroup, ...]:
    """List the groups in scope in the order of the forward pass."""
    kinds = SCOPES[recipe.scope]
    if recipe.head_units not in (None, "kv-group") and "attention" not in kinds:
        raise UnsupportedError(
            "heads stay as they are where attention is not in scope",
            got=f"--head-units {recipe.head_units}, --scope {recipe.scope}",
            wanted="--scope attention or all, or --head-units left out",
        )
    # One of each kind, that can lose units where some block has such.
    groups = {group.kind: group for group in sorted(stock.groups, key=lambda group: bool(group.config_fields))}
    for kind in kinds:
        if kind == "attention" and has_narrow_values(stock.layout.config):
            raise UnsupportedError(
                "the source's heads have lost value channels, and attention is pruned of whole heads' activations",
                where=str(stock.reader.directory),
                got=f"--scope {recipe.scope}, {VALUES_ENTRY} in per_layer_config",
                wanted="--scope mlp",
                do="prune the attention of the dense model instead",
            )
        if kind not in method.kinds:
            raise UnsupportedError(
                f"method {method.name!r} does not prune {kind}",
                got=f"--scope {recipe.scope}",
                wanted=f"--scope {method.kinds[0]}",
            )
        if kind not in groups:
            raise UnsupportedError(
                f"no block of the model has {kind} whose units are described",
                got=f"--scope {recipe.scope}",
                wanted=f"--scope {' or '.join(groups)}" if groups else "a model with attention or MLPs",
            )
        if not groups[kind].config_fields:
            raise UnsupportedError(
                f"stock {stock.family.name} cannot express fewer {kind} units",
                where=groups[kind].held,
                got=f"--scope {recipe.scope}",
                wanted="--scope mlp" if kind == "attention" else "--method depth, which removes whole blocks",
            )
    return tuple(group for kind in kinds for group in stock.groups if group.kind == kind)
