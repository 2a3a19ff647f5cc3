"""One block of the pruning pass: statistics, decision, solve.

Shape suffixes: B windows, S positions, D hidden size, T tokens, U units, I consumer inputs, O outputs, K kept inputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from structprune.architectures.units import remove_sublayer
from structprune.engine.layerwise.few_tokens import token_statistics
from structprune.engine.layerwise.refine import refine
from structprune.engine.layerwise.solve import SolvedGroup, Wanted, solve_cost, solve_group, with_group
from structprune.engine.layerwise.statistics import (
    Streams,
    Sublayer,
    fill_inputs,
    finish_stage,
    follow_dense,
    measure,
)
from structprune.engine.run.context import RunContext
from structprune.engine.streaming.activation_cache import SolvedConsumer
from structprune.memory import release_free_memory
from structprune.phases import Phase, SublayerPhase
from structprune.ranks import deal, turns
from structprune.results.schema import BlockReport
from structprune.solvers import SOLVERS
from structprune.types import (
    UNIT_KINDS,
    BlockLayout,
    Moments,
    Sensitivity,
    Stage,
    UnitGroup,
    UnitKind,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """A block of which some sublayers are decided and solved."""

    tensors: Mapping[str, Tensor]
    """All tensors of the block, relative names, stored dtype."""
    reports: Sequence[BlockReport] = ()
    """One per sublayer."""
    kept: Mapping[str, list[int]] = field(default_factory=dict)
    """Name of the group -> units; of a sublayer that is gone, its kind -> none."""
    costs: Mapping[str, Tensor] = field(default_factory=dict)
    """Kind -> loss that each removal adds, (units,), where it was asked for."""

    def followed_by(self, sublayer: BlockResult) -> BlockResult:
        """Add one more sublayer: its tensors are those of the block by then."""
        return BlockResult(
            tensors=sublayer.tensors,
            reports=[*self.reports, *sublayer.reports],
            kept={**self.kept, **sublayer.kept},
            costs={**self.costs, **sublayer.costs},
        )


def prune_block(
    context: RunContext,
    block: BlockLayout,
    num_keep: Mapping[str, int],
    streams: Streams,
    sensitivity: Mapping[str, Sensitivity],
    *,
    given: Mapping[str, Sequence[int]] | None = None,
    measure_costs: bool = False,
) -> BlockResult:
    """Measure, decide and solve one sublayer of the block after the other; both streams move on to the block's output.

    Sublayers that read the same state of the stream are solved against the same output, each with the others as they
    are by then; the streams move once for all of them. Units that are `given` by the name of their group are not
    chosen, only solved for. With `measure_costs` the removals of each sublayer have their costs measured again, on the
    pruned model's stream.
    """
    with context.meter.phase(Phase.READ_BLOCK):
        result = BlockResult(tensors=context.reader.read(block.shapes, block.prefix))
    widths: dict[str, int] = {}
    module = cut_module(context, block, result.tensors, widths)
    if not context.follows_dense:
        with context.meter.phase(Phase.PROPAGATE):
            streams.propagator.run(module, block.index, streams.dense)
    for stage, kinds in _stages(context, block):
        reference, inputs_NSI = None, _cached_inputs(context, block, stage, num_keep, streams)
        if context.follows_dense:
            with context.meter.phase(Phase.PROPAGATE):
                measured = _measured(block, kinds, num_keep)
                reference = follow_dense(context, block, stage, measured, module, streams)
        for kind in kinds:
            if kind not in num_keep:
                continue
            if num_keep[kind] == 0:
                pruned = _remove(block, kind, result.tensors)
            else:
                sublayer = Sublayer(
                    block=block,
                    groups=block.groups_of(kind),
                    module=module,
                    streams=streams,
                    reference=reference,
                    inputs_NSI=inputs_NSI,
                )
                widths[kind] = num_keep[kind]
                pruned = _prune_sublayer(
                    context,
                    sublayer,
                    result.tensors,
                    widths,
                    sensitivity,
                    given=given or {},
                    measure_costs=measure_costs,
                )
                del sublayer
            widths[kind] = num_keep[kind]
            result = result.followed_by(pruned)
            # Of the block as it was nothing is needed any more: the next module takes its place.
            del pruned, module
            module = cut_module(context, block, result.tensors, widths)
            # What a sublayer leaves in the heap would otherwise add to the next one's peak.
            release_free_memory()
        with context.meter.phase(Phase.PROPAGATE):
            _advance(context, block, stage, module, result.tensors, result.kept, streams, inputs_NSI)
    return result


def _advance(
    context: RunContext,
    block: BlockLayout,
    stage: Stage,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    kept: Mapping[str, Sequence[int]],
    streams: Streams,
    inputs_NSI: Tensor | None,
) -> None:
    """Move the pruned stream over a stage of which every sublayer is cut: `module` has what is left of the block.

    With `inputs_NSI` the stage is one sublayer, and these are the inputs of its consumer before the cut.
    """
    if inputs_NSI is not None:
        group = block.group(stage[0])
        consumer = SolvedConsumer.of(group, tensors, kept[group.name], context.dtype)
        finish_stage(streams, consumer, inputs_NSI, block.index)
    else:
        with context.stock.stage(module, block.index, stage):
            streams.propagator.run(module, block.index, streams.pruned)


def _cached_inputs(
    context: RunContext, block: BlockLayout, stage: Stage, num_keep: Mapping[str, int], streams: Streams
) -> Tensor | None:
    """Return the cache for a consumer's inputs, if its sublayer is finished from them; None for all others."""
    kind = stage[0]
    if streams.cache is None or kind not in context.plan.cached or not num_keep.get(kind) or not block.has(kind):
        return None
    return streams.cache.inputs(block.group(kind))


def pass_block(
    context: RunContext,
    block: BlockLayout,
    tensors: Mapping[str, Tensor],
    num_keep: Mapping[str, int],
    kept: Mapping[str, Sequence[int]],
    streams: Streams,
) -> None:
    """Move both streams over a block whose pruned `tensors` are there already, product for product as `prune_block`."""
    module = cut_module(context, block, context.reader.read(block.shapes, block.prefix), {})
    if not context.follows_dense:
        streams.propagator.run(module, block.index, streams.dense)
    else:
        for stage, sublayers in _stages(context, block):
            groups = _measured(block, sublayers, num_keep)
            reference = follow_dense(context, block, stage, groups, module, streams)
            if any(group.output_normed for group in groups):
                # There the stream moves as it is asked.
                for first, last in chain(*context.window_sets):
                    for start, stop in streams.propagator.batches(first, last):
                        reference(start, stop)
    widths = {kind: num for kind, num in num_keep.items() if block.has(kind)}
    for stage, _ in _stages(context, block):
        inputs_NSI = _cached_inputs(context, block, stage, num_keep, streams)
        del module
        if inputs_NSI is None:
            module = cut_module(context, block, tensors, widths)
        else:
            module = cut_module(context, block, context.reader.read(block.shapes, block.prefix), {})
            fill_inputs(inputs_NSI, context, block, block.group(stage[0]), module, streams)
        _advance(context, block, stage, module, tensors, kept, streams, inputs_NSI)


def _stages(context: RunContext, block: BlockLayout) -> list[tuple[Stage, list[UnitKind]]]:
    """List the stages of which the block has sublayers, each with those that have units."""
    stages: list[tuple[Stage, list[UnitKind]]] = []
    for stage in context.stock.stages_of(block.index):
        sublayers: list[UnitKind] = [kind for kind in UNIT_KINDS if kind in stage and block.has(kind)]
        if sublayers or "mixer" in stage:
            stages.append((stage, sublayers))
    return stages


def _measured(block: BlockLayout, sublayers: Sequence[UnitKind], num_keep: Mapping[str, int]) -> list[UnitGroup]:
    """List one group of each sublayer that is to keep some of its units."""
    return [block.group(kind) for kind in sublayers if num_keep.get(kind, 0) > 0]


def _remove(block: BlockLayout, kind: UnitKind, tensors: Mapping[str, Tensor]) -> BlockResult:
    """Remove the whole sublayer."""
    report = BlockReport(
        block=block.index,
        kind=kind,
        num_units=block.group(kind).num_units,
        kept_units=0,
        error_mask_only=None,
        error=None,
        status="removed",
        statistics={},
        objective=[],
        seconds=0.0,
    )
    return BlockResult(tensors=remove_sublayer(tensors, block, kind), kept={kind: []}, reports=[report])


def _prune_sublayer(
    context: RunContext,
    sublayer: Sublayer,
    tensors: Mapping[str, Tensor],
    widths: Mapping[str, int],
    sensitivity: Mapping[str, Sensitivity],
    *,
    given: Mapping[str, Sequence[int]],
    measure_costs: bool,
) -> BlockResult:
    """Prune each group of a sublayer: the only one, or every expert's own choice of as many units.

    `widths`: kind -> units per group, of this sublayer and of those that came first.
    """
    block, kind, num_keep = sublayer.block, sublayer.kind, widths[sublayer.kind]
    started = time.perf_counter()
    groups = {group.name: group for group in sublayer.groups}
    # Which rank decides and solves which group.
    owners = deal({name: solve_cost(block, group) for name, group in groups.items()}, context.ranks.size)
    measured: list[dict[str, Moments]] = []
    if context.method.needs_statistics:
        with context.meter.phase(SublayerPhase.STATISTICS.of(kind)):
            measured = [measure(context, sublayer, windows, owners) for windows in context.window_sets]
        # Freed activations would otherwise stay in the heap, in holes that no matrix fits into.
        release_free_memory()
    parts: dict[str, SolvedGroup] = {}
    cut = dict(tensors)
    for turn in turns(owners):
        with context.meter.phase(SublayerPhase.SOLVE.of(kind)):
            tasks = {
                name: (
                    owners[name],
                    partial(
                        solve_group,
                        context,
                        block,
                        groups[name],
                        cut,
                        Wanted(num_keep=num_keep, units=given.get(name)),
                        [moments.pop(name) for moments in measured if name in moments],
                        sensitivity.get(name, sensitivity.get(kind)),
                        measure_costs=measure_costs,
                    ),
                )
                for name in turn
            }
            parts |= context.ranks.all_gather(tasks)
            del tasks
            for name in turn:
                cut = with_group(cut, groups[name], parts[name])
                if len(groups) > 1:
                    parts[name] = parts[name].written()
    parts = {name: parts[name] for name in groups}
    statistics = _means([part.statistics for part in parts.values()])
    counts = [part.tokens for part in parts.values() if part.tokens is not None]
    statistics |= token_statistics(counts, context.num_measured_tokens)
    objective: list[float] = []
    group, first = next(iter(groups.values())), next(iter(parts.values()))
    if kind == "mlp" and SOLVERS.get(context.solver).propose is not None and 0 < num_keep < group.num_units:
        pruned = cut_module(context, block, cut, widths)
        with context.meter.phase(Phase.ITERATE):
            refined = refine(context, sublayer, pruned, cut, first.result)
        cut, objective = refined.tensors, refined.objective
        statistics |= refined.statistics
    before, after = _relative([part.errors for part in parts.values() if part.errors is not None])
    costs = [part.cost_U for part in parts.values() if part.cost_U is not None]
    report = BlockReport(
        block=block.index,
        kind=kind,
        num_units=group.num_units,
        kept_units=num_keep,
        error_mask_only=before,
        error=after,
        status="ok" if all(part.result.status == "ok" for part in parts.values()) else "damping-raised",
        statistics=statistics,
        objective=objective,
        seconds=time.perf_counter() - started,
    )
    return BlockResult(
        tensors=cut,
        kept={name: part.keep_units.tolist() for name, part in parts.items()},
        reports=[report],
        costs={kind: torch.stack(costs).sum(dim=0)} if costs else {},
    )


def _means(statistics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each statistic over the parts that have it, and count the parts; those of one part are as they are."""
    if len(statistics) == 1:
        return dict(statistics[0])
    by_name: dict[str, list[float]] = {}
    for each in statistics:
        for name, value in each.items():
            by_name.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in by_name.items()}
    return means | {"parts": float(len(statistics))}


def cut_module(
    context: RunContext, block: BlockLayout, tensors: Mapping[str, Tensor], widths: Mapping[str, int]
) -> nn.Module:
    """Build the stock layer with the units that are left, in the dtype of the forward passes."""
    # Before a sublayer is solved its tensors are the source's, and so is its bias or the lack of one.
    biased: list[UnitKind] = [kind for kind in UNIT_KINDS if widths.get(kind) and context.adds_bias]
    config = context.stock.resized_config(widths, block.index, biased)
    # In rows, as one that was read from a file: products with another layout differ in their last bits.
    cast = {name: tensor.to(context.device, context.dtype).contiguous() for name, tensor in tensors.items()}
    removed: list[UnitKind] = [kind for kind in UNIT_KINDS if widths.get(kind) == 0]
    return context.stock.block(block.index, cast, config, removed)


def _relative(errors: Sequence[tuple[float, float, float]]) -> tuple[float | None, float | None]:
    """Divide both errors of all parts by the energy of all; None where nothing was measured."""
    if not errors:
        return None, None
    before, after, energy = (sum(values) for values in zip(*errors, strict=True))
    return (before / energy, after / energy) if energy > 0 else (0.0, 0.0)
