"""What a run that prunes weight by weight is to do, and what the planner has to know of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from structprune.architectures.stock.loading import has_own_modeling_file
from structprune.architectures.stock.maps import MapStep, map_steps
from structprune.architectures.stock.model import StockModel
from structprune.engine.layerwise.elements import reads_of
from structprune.engine.planning.elements import MapProblem, StepMemory
from structprune.engine.planning.forecast import Forecast, PlannedZeros, shape_of
from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.tensors import BlockTensors, result_tensors
from structprune.engine.planning.widths import check_shared_out
from structprune.engine.streaming.activation_cache import cacheable_maps
from structprune.errors import InputError, UnsupportedError
from structprune.kinds import SCOPES, Structure
from structprune.linalg.assignment import EXTRA, PACKAGES
from structprune.methods import METHODS
from structprune.methods.method import Method
from structprune.patterns import Pattern, as_pattern
from structprune.recipe.elements import ElementsRecipe, ResolvedElements
from structprune.registry import check_installed
from structprune.solvers.elements import PRUNERS, SHARINGS, UPDATES, Pruner, Update
from structprune.types import BlockLayout, UnitGroup, UnitKind

_UNSTRUCTURED = "unstructured"


def element_settings(
    recipe: ElementsRecipe, method: Method, stock: StockModel
) -> tuple[ResolvedElements, tuple[UnitGroup, ...]]:
    """Fill every entry of the recipe, and find the sublayers in scope.

    Raises InputError for rows that cannot have the pattern, UnsupportedError for combinations without a meaning.
    """
    kinds = _kinds(recipe, stock)
    solver = UPDATES.check(recipe.solver or method.solver)
    reads = reads_of(method, solver)
    damping = recipe.damping or method.damping
    if "gram" not in reads:
        _refuse_idle(recipe, method)
        damping = 1e-2
    resolved = ResolvedElements.of(
        recipe,
        pattern=as_pattern(recipe.pattern or _UNSTRUCTURED, recipe.sparsity, method.counts).name,
        damping=damping,
        solver=solver,
        target=recipe.target or method.target,
        structure=_structure(recipe, stock),
    )
    pattern = as_pattern(resolved.pattern, resolved.sparsity, method.counts)
    _check_shares(resolved, pattern)
    if recipe.permute_channels and pattern.group == 1:
        raise UnsupportedError(
            "the order of channels matters to groups only",
            got=f"--permute-channels, --pattern {pattern.name}",
            wanted="--pattern N:M, such as 2:4",
        )
    if recipe.permute_channels:
        check_installed("--permute-channels", PACKAGES, EXTRA)
    steps = map_steps(stock, kinds)
    if not any(steps):
        raise UnsupportedError("no block has a linear map in scope", got=f"--scope {recipe.scope}")
    groups = [group for own in steps for step in own for group in step.groups]
    if SHARINGS.get(resolved.allocator).by_loss and any(group.expert is not None for group in groups):
        raise UnsupportedError(
            "what zeros of experts add to the loss is not measured",
            got=f"--allocator {resolved.allocator}",
            wanted="--allocator uniform or owl",
        )
    for block, own in zip(stock.layout.blocks, steps, strict=True):
        for name in _maps(own):
            pattern.check(_shape(stock, block, name)[1], f"block {block.index} {name}")
        if resolved.follows_dense and any(len(step.groups) > 1 for step in own):
            raise UnsupportedError(
                "the dense model sends other tokens to its experts than the pruned one",
                got="--target dense-path",
                wanted="--target local",
            )
    return resolved, tuple(group for kind in kinds for group in stock.groups if group.kind == kind)


def _kinds(recipe: ElementsRecipe, stock: StockModel) -> list[UnitKind]:
    """Return the sublayers in scope, in the order of the forward pass."""
    wanted: list[UnitKind] = list(SCOPES[recipe.scope])
    found = {group.kind for group in stock.groups}
    if not any(kind in found for kind in wanted):
        raise UnsupportedError(
            "no block of the model has such a sublayer that is described",
            got=f"--scope {recipe.scope}",
            wanted=f"--scope {' or '.join(sorted(found))}" if found else "a model with attention or MLPs",
        )
    return [kind for kind in wanted if kind in found]


def _structure(recipe: ElementsRecipe, stock: StockModel) -> Structure:
    """Return the source's structure, which stays. Raises UnsupportedError where another is asked for."""
    own = Structure.PER_LAYER if has_own_modeling_file(stock.reader.directory) else Structure.UNIFORM
    if recipe.structure not in (None, own):
        raise UnsupportedError(
            "shapes stay where single weights go, and so does the structure",
            got=f"--structure {recipe.structure}",
            wanted=f"--structure {own}, or none",
        )
    return own


def _check_shares(recipe: ResolvedElements, pattern: Pattern) -> None:
    """Raise InputError for an unknown allocator and a share that is too near to its ends for it, UnsupportedError where
    the pattern says the share.
    """
    sharing = SHARINGS.get(SHARINGS.check(recipe.allocator))
    if sharing.measure is None and not sharing.by_loss:
        return
    if pattern.group > 1:
        raise UnsupportedError(
            "every block has the share that the pattern says",
            got=f"--allocator {recipe.allocator}, --pattern {pattern.name}",
            wanted="--pattern unstructured, or --allocator uniform",
        )
    if not sharing.reach <= pattern.share <= 1 - sharing.reach:
        raise InputError(
            f"shares of blocks may be {sharing.reach:g} from the whole's with --allocator {recipe.allocator}",
            got=f"--sparsity {pattern.share:g}",
            wanted=f"between {sharing.reach:g} and {1 - sharing.reach:g}",
        )


def _refuse_idle(recipe: ElementsRecipe, method: Method) -> None:
    """Raise UnsupportedError for settings of a solver where no weight is solved again."""
    for flag, value in (("--damping", recipe.damping), ("--target", recipe.target)):
        if value not in (None, "local"):
            raise UnsupportedError(
                f"method {method.name!r} solves no weight again, so {flag} has no meaning",
                got=f"{flag} {value}",
                do="add --solver refit, or leave it out",
            )


def elements_need_windows(recipe: ResolvedElements, method: Method) -> bool:
    """Return whether weights are chosen or solved, or their shares decided, by what windows measure."""
    sharing = SHARINGS.get(recipe.allocator)
    return bool(reads_of(method, recipe.solver)) or sharing.measure is not None or sharing.by_loss


def element_request(request: PlanRequest, recipe: ResolvedElements, method: Method, stock: StockModel) -> PlanRequest:
    """Complete the request: the steps of every sort of block, with the sums and the workspace of each."""
    kinds: list[UnitKind] = list(dict.fromkeys(group.kind for group in request.groups))
    pruner, update = PRUNERS.get(method.score), UPDATES.get(recipe.solver)
    reads = reads_of(method, recipe.solver)
    sorts: dict[frozenset[str], tuple[StepMemory, ...]] = {}
    all_steps = map_steps(stock, kinds)
    pairs = list(zip(stock.layout.blocks, all_steps, strict=True))
    for block, steps in sorted(pairs, key=lambda pair: pair[0].num_parameters):
        sorts[frozenset(block.shapes)] = tuple(
            StepMemory(
                kind=step.kind,
                problems=tuple(
                    MapProblem(
                        inputs=_shape(stock, block, group.maps[0])[1],
                        outputs=max(_shape(stock, block, name)[0] for name in group.maps),
                        read=bool(reads),
                        squares="gram" in reads,
                        followed=recipe.follows_dense,
                        sets=2 if recipe.chooses_ridge else 1,
                        permuted=recipe.permute_channels,
                        workspace=_workspace(pruner, update, stock, block, group.maps),
                        shared=_shared(pruner, update, _shape(stock, block, group.maps[0])[1], group.maps),
                    )
                    for group in step.groups
                ),
            )
            for step in steps
        )
    sharing = SHARINGS.get(recipe.allocator)
    # In another order a map's inputs are not those that were measured.
    kept = bool(reads) and not recipe.permute_channels
    return replace(
        request,
        needs_statistics=False,
        needs_scores=sharing.measure is not None,
        needs_sensitivity=sharing.by_loss,
        elements=sorts,
        follows_dense=recipe.follows_dense,
        cacheable=cacheable_maps(stock, kinds, all_steps) if kept else (),
    )


def _workspace(pruner: Pruner, update: Update, stock: StockModel, block: BlockLayout, maps: Sequence[str]) -> int:
    """Return the bytes of the pruner, or of the update beside the pruner's answer, for the widest of some maps.

    What either keeps for other maps is there while the other one works.
    """
    shapes = [_shape(stock, block, name) for name in maps]
    shared = _shared(pruner, update, shapes[0][1], maps)

    def most(outputs: int, inputs: int) -> int:
        first = pruner.workspace(inputs, outputs) + max(0, shared - pruner.shares(inputs))
        second = update.workspace(inputs, outputs) + max(0, shared - update.shares(inputs))
        return max(first, second + 5 * outputs * inputs)

    return max(most(*shape) for shape in shapes)


def _shared(pruner: Pruner, update: Update, inputs: int, maps: Sequence[str]) -> int:
    """Return the bytes that stay of one map's solve for those behind it."""
    return max(pruner.shares(inputs), update.shares(inputs)) if len(maps) > 1 else 0


def _maps(steps: Sequence[MapStep]) -> list[str]:
    return [name for step in steps for group in step.groups for name in group.maps]


def _shape(stock: StockModel, block: BlockLayout, name: str) -> tuple[int, int]:
    """Return (outputs, inputs) of a map."""
    first, second = block.shapes[f"{name}.weight"]
    return (second, first) if stock.family.inputs_first else (first, second)


def forecast_elements(stock: StockModel, recipe: ResolvedElements, kinds: Sequence[UnitKind]) -> Forecast:
    """Forecast all of the result: the tensors of the source, with zeros.

    Raises UnsupportedError where processes could not share them.
    """
    check_shared_out(stock, recipe, {})

    def tensors_of(block: BlockLayout) -> BlockTensors:
        yield from ((name, name, shape) for name, shape in block.shapes.items())

    return Forecast(
        shape=shape_of(stock, recipe, stock.layout.config),
        kept=None,
        shares=None,
        tensors=result_tensors(stock, recipe, stock.layout.blocks, tensors_of),
        zeros=PlannedZeros(
            pattern=recipe.pattern,
            share=as_pattern(recipe.pattern, recipe.sparsity, "layer").share,
            weights=sum(
                math.prod(_shape(stock, block, name))
                for block, steps in zip(stock.layout.blocks, map_steps(stock, kinds), strict=True)
                for name in _maps(steps)
            ),
            sums=_sums(recipe),
        ),
    )


def _sums(recipe: ResolvedElements) -> str:
    """Say what is summed of the maps' inputs."""
    method = METHODS.get(recipe.method).in_pipeline(recipe.pipeline)
    reads = reads_of(method, recipe.solver)
    if not reads:
        return "none: the weights alone decide"
    return "products of all pairs of inputs" if "gram" in reads else "squares of the inputs, without a Gram matrix"
