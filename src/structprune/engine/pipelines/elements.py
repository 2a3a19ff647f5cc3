"""The pipeline that sets single weights to zero: measure what maps read, solve them, write, propagate; block by block.

Inside a block the maps are pruned in the order of the forward pass, those that read one tensor together from one sum of
products, so that each is measured behind the pruned ones before it. What a method does not read is not summed.

Shape suffixes: N windows, S positions, D hidden size.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structprune.architectures.stock.maps import InputGroup, MapStep, map_steps
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.layerwise.elements import (
    GroupSums,
    PrunedMap,
    joined_sums,
    map_patterns,
    pattern_of,
    prune_map,
    reads_of,
)
from structprune.engine.layerwise.maps import BlockModules, InputSums, measure_maps
from structprune.engine.layerwise.orders import channel_order, in_order, input_order, movable_groups
from structprune.engine.layerwise.statistics import Streams, fill_inputs, finish_stage, open_cache
from structprune.engine.passes import BlockPass, Line, PassState, Visited, run_pass
from structprune.engine.pipelines.elements_shares import element_shares
from structprune.engine.run.context import RunContext
from structprune.engine.run.finalize import Outcome, finalize
from structprune.engine.streaming.activation_cache import SolvedConsumer
from structprune.engine.streaming.final_states import first_windows
from structprune.errors import InputError, NumericalError
from structprune.memory import release_free_memory
from structprune.patterns import NM, Pattern
from structprune.phases import Phase, SublayerPhase
from structprune.recipe.elements import ResolvedElements
from structprune.results.report import PruneReport
from structprune.results.schema import BlockReport
from structprune.results.sizes import ZerosReport
from structprune.types import BlockLayout, Stage

_NUMBER = re.compile(r"\.\d+\.")


def execute_elements(context: RunContext) -> PruneReport:
    """Prune block after block into the run's staging directory and turn it into the output.

    Raises NumericalError for weights or activations that are not finite, CheckpointError for unreadable tensors,
    InputError for a text of one window where one is to choose the ridge.
    """
    if context.recipe.chooses_ridge and len(context.windows.ids_NS) < 2:
        raise InputError(
            "one window cannot both fit and choose the ridge",
            where=context.calibration_name,
            got="1 window, --damping auto",
            wanted="at least 2 windows, or a number for --damping",
        )
    layout = context.stock.layout
    writer = ModelWriter(context.run.shards, len(layout.blocks), layout.blocks_module, context.file_form)
    steps = map_steps(context.stock, context.kinds)
    patterns = map_patterns(context, element_shares(context, steps))
    result = run_pass(context, _elements_pass(context, writer, steps, patterns))
    reports = [BlockReport(**report) for line in result.lines for report in line["reports"]]
    weights, kept = (sum(getattr(report, name) for report in reports) for name in ("num_units", "kept_units"))
    outcome = Outcome(
        reports=reports,
        kept_indices={str(number): line["zeros"] for number, line in enumerate(result.lines)},
        dense_NSD=result.final["dense"],
        pruned_NSD=result.final["pruned"],
        shares=None,
        zeros=ZerosReport(
            pattern=pattern_of(context).name,
            asked=pattern_of(context).share,
            weights=weights,
            zeros=weights - kept,
            nonzero_parameters=layout.all_parameters - (weights - kept),
        ),
    )
    return finalize(context, writer, dict(context.reader.config), outcome, weights)


def _elements_pass(
    context: RunContext,
    writer: ModelWriter,
    steps: Sequence[Sequence[MapStep]],
    patterns: Sequence[Mapping[str, Pattern]],
) -> BlockPass:
    """Describe the pass, with the streams of the pruned model and of the dense one."""
    num_windows, cache = len(context.windows.ids_NS), open_cache(context)

    def streams(state: PassState) -> Streams:
        return Streams(
            propagator=state.propagator, pruned=state.stores["pruned"], dense=state.stores["dense"], cache=cache
        )

    def visit(block: BlockLayout, state: PassState) -> Visited:
        found = prune_maps(context, block, steps[block.index], patterns[block.index], streams(state))
        return Visited(
            tensors=found.tensors,
            values={
                "tensors": list(found.tensors),
                "reports": [report.model_dump(mode="json") for report in found.reports],
                "zeros": dict(found.zeros),
            },
        )

    def replay(block: BlockLayout, line: Line, state: PassState) -> None:
        with context.meter.phase(Phase.READ_BLOCK):
            dense = _module(context, block, context.reader.read(block.shapes, block.prefix))
            tensors = writer.read_block(block.index, line["tensors"])
            pruned = _module(context, block, tensors)
        modules = BlockModules(block=block, pruned=pruned, dense=dense if context.follows_dense else None)
        _follow_probe(context, block, dense, streams(state))
        del dense
        for stage in _stages(context, block):
            inputs_NSI = _kept_inputs(context, block, stage, streams(state))
            if inputs_NSI is not None:
                fill_inputs(inputs_NSI, context, block, block.group(stage[0]), pruned, streams(state))
            _advance(context, modules, stage, streams(state), tensors, inputs_NSI)

    def finish(state: PassState) -> dict[str, Tensor]:
        return {name: first_windows(context.ranks, store, context.num_probe) for name, store in state.stores.items()}

    return BlockPass(
        name="prune",
        journal=context.run.journal,
        stores={"pruned": num_windows, "dense": num_windows if context.follows_dense else context.num_probe},
        visit=visit,
        replay=replay,
        finish=finish,
        describe=_describe,
        writer=writer,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _PrunedBlock:
    """A block with zeros."""

    tensors: Mapping[str, Tensor]
    reports: Sequence[BlockReport]
    zeros: Mapping[str, int]
    """Map -> its zeros."""


def prune_maps(
    context: RunContext,
    block: BlockLayout,
    steps: Sequence[MapStep],
    patterns: Mapping[str, Pattern],
    streams: Streams,
) -> _PrunedBlock:
    """Prune one map of the block after the other; both streams move on to the block's output."""
    with context.meter.phase(Phase.READ_BLOCK):
        tensors = dict(context.reader.read(block.shapes, block.prefix))
        cast = {name: tensor.to(context.device, context.dtype) for name, tensor in tensors.items()}
        # Of both modules the weights are the same tensors, until one of them gets new ones.
        pruned = context.stock.block(block.index, cast)
        dense = context.stock.block(block.index, cast) if context.follows_dense else None
        del cast
    modules = BlockModules(block=block, pruned=pruned, dense=dense)
    _follow_probe(context, block, pruned, streams)
    found: dict[str, list[tuple[str, PrunedMap, float]]] = {}
    for stage in _stages(context, block):
        inputs_NSI, own = _kept_inputs(context, block, stage, streams), [step for step in steps if step.stage == stage]
        for step in own:
            kept_NSI = inputs_NSI if step is own[-1] else None
            for name, pruned_map, seconds in _prune_step(context, modules, step, tensors, patterns, streams, kept_NSI):
                found.setdefault(_NUMBER.sub(".*.", name), []).append((name, pruned_map, seconds))
        _advance(context, modules, stage, streams, tensors, inputs_NSI)
    return _PrunedBlock(
        tensors=tensors,
        reports=[_report(block, kind, parts) for kind, parts in found.items()],
        zeros={name: part.num_zeros for parts in found.values() for name, part, _ in parts},
    )


def _prune_step(
    context: RunContext,
    modules: BlockModules,
    step: MapStep,
    tensors: dict[str, Tensor],
    patterns: Mapping[str, Pattern],
    streams: Streams,
    inputs_NSI: Tensor | None,
) -> list[tuple[str, PrunedMap, float]]:
    """Measure and prune the maps of one step, in place: (name, what became of it, seconds).

    With `inputs_NSI` what they read is kept there.
    """
    block, started = modules.block, time.perf_counter()
    reads = reads_of(context.method, context.settings(ResolvedElements).solver)
    measured: list[list[InputSums]] = []
    if reads:
        with context.meter.phase(SublayerPhase.STATISTICS.of(step.kind)):
            measured = [
                measure_maps(context, modules, step, streams, windows, reads, inputs_NSI)
                for windows in context.window_sets
            ]
        # Freed activations would otherwise stay in the heap, in holes that no matrix fits into.
        release_free_memory()
    found: list[tuple[str, PrunedMap, float]] = []
    with context.meter.phase(SublayerPhase.SOLVE.of(step.kind)):
        for group in step.groups:
            weights = {name: tensors[f"{name}.weight"] for name in group.maps}
            try:
                sums = joined_sums(context, patterns, weights, [each.pop(0) for each in measured])
            except NumericalError as error:
                raise error.inside(f"block {block.index} {group.maps[0]}") from error
            del weights
            if context.settings(ResolvedElements).permute_channels:
                sums = _permuted(context, modules, group, tensors, sums)
            for name in group.maps:
                weight = f"{name}.weight"
                seed = context.recipe.seed * 1_000_003 + block.index * 10_007 + list(block.shapes).index(weight)
                try:
                    part = prune_map(context, tensors[weight], name, sums, seed)
                except NumericalError as error:
                    # Pruners see a matrix, not where it is from.
                    raise error.inside(f"block {block.index} {name}") from error
                tensors[weight] = part.weight
                modules.pruned.get_parameter(weight).data = part.weight.to(context.device, context.dtype)
                found.append((name, part, time.perf_counter() - started))
                started = time.perf_counter()
                release_free_memory()
            # What was kept for all maps of the group.
            del sums
    return found


def _permuted(
    context: RunContext, modules: BlockModules, group: InputGroup, tensors: dict[str, Tensor], sums: GroupSums
) -> GroupSums:
    """Put the channels that a map reads in another order, where it is free, in `tensors` and the pruned module.

    Returns the sums in that order.
    """
    block, stock = modules.block, context.stock
    units = movable_groups(stock, block, context.kinds).get(group.maps[0]) if len(group.maps) == 1 else None
    if units is None:
        return sums
    stored = tensors[f"{group.maps[0]}.weight"]
    weight_OI = stored.T if stock.family.inputs_first else stored
    energy_I = torch.ones(weight_OI.shape[1]) if sums.total is None else sums.total.moments.gram_II.diagonal().cpu()
    pattern = sums.patterns[group.maps[0]]
    assert isinstance(pattern, NM), "an order matters to groups only"
    order_U = channel_order(weight_OI, energy_I, units, pattern)
    for name, tensor in in_order(tensors, units, order_U).items():
        tensors[name] = tensor
        modules.pruned.get_parameter(name).data = tensor.to(context.device, context.dtype)
    return sums.reordered(input_order(units, weight_OI.shape[1], order_U))


def _report(block: BlockLayout, kind: str, parts: Sequence[tuple[str, PrunedMap, float]]) -> BlockReport:
    """Report one map, or that of all experts together."""
    maps = [part for _, part, _ in parts]
    numbers = sum(part.weight.numel() for part in maps)
    errors = [part.errors for part in maps if part.errors is not None]
    held_out = [part.held_out for part in maps if part.held_out is not None]
    statistics = {
        name: _mean([part.statistics[name] for part in maps if name in part.statistics])
        for name in dict.fromkeys(name for part in maps for name in part.statistics)
    }
    if held_out and (wanted := sum(energy for _, energy in held_out)) > 0:
        statistics["held_out_error"] = sum(error for error, _ in held_out) / wanted
    before = after = None
    if errors:
        wanted = sum(energy for _, _, energy in errors)
        before, after = ((sum(e[place] for e in errors) / wanted if wanted > 0 else 0.0) for place in (0, 1))
    return BlockReport(
        block=block.index,
        kind=kind,
        num_units=numbers,
        kept_units=numbers - sum(part.num_zeros for part in maps),
        error_mask_only=before,
        error=after,
        status="ok" if all(part.status == "ok" for part in maps) else "damping-raised",
        statistics=statistics,
        objective=[],
        seconds=sum(seconds for _, _, seconds in parts),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _stages(context: RunContext, block: BlockLayout) -> list[Stage]:
    """List the stages of which the block has something."""
    return [
        stage
        for stage in context.stock.stages_of(block.index)
        if "mixer" in stage or any(block.has(kind) for kind in stage)
    ]


def _follow_probe(context: RunContext, block: BlockLayout, dense: nn.Module, streams: Streams) -> None:
    """Move the reported windows over the dense block, where the others are not followed."""
    if not context.follows_dense:
        with context.meter.phase(Phase.PROPAGATE):
            streams.propagator.run(dense, block.index, streams.dense)


def _kept_inputs(context: RunContext, block: BlockLayout, stage: Stage, streams: Streams) -> Tensor | None:
    """Return the cache for what the stage's last map reads, if the stage is finished from it; None for all others."""
    kind = stage[0]
    if streams.cache is None or kind not in context.plan.cached or not block.has(kind):
        return None
    return streams.cache.inputs(block.group(kind))


def _advance(
    context: RunContext,
    modules: BlockModules,
    stage: Stage,
    streams: Streams,
    tensors: Mapping[str, Tensor],
    inputs_NSI: Tensor | None,
) -> None:
    """Move the pruned stream over a stage whose maps are pruned, and the dense one where it is followed.

    `tensors` are those of the pruned block; `inputs_NSI` is what the stage's last map reads, where it is kept.
    """
    index = modules.block.index
    with context.meter.phase(Phase.PROPAGATE):
        if modules.dense is not None:
            with context.stock.stage(modules.dense, index, stage):
                streams.propagator.run(modules.dense, index, streams.dense)
        if inputs_NSI is not None:
            group = modules.block.group(stage[0])
            consumer = SolvedConsumer.of(group, tensors, range(group.num_units), context.dtype)
            finish_stage(streams, consumer, inputs_NSI, index)
            return
        with context.stock.stage(modules.pruned, index, stage):
            streams.propagator.run(modules.pruned, index, streams.pruned)


def _module(context: RunContext, block: BlockLayout, tensors: Mapping[str, Tensor]) -> nn.Module:
    cast = {name: tensor.to(context.device, context.dtype) for name, tensor in tensors.items()}
    return context.stock.block(block.index, cast)


def _describe(block: BlockLayout, line: Line) -> str:
    reports = [BlockReport(**report) for report in line["reports"]]
    weights, kept = sum(each.num_units for each in reports), sum(each.kept_units for each in reports)
    errors = [each.error for each in reports if each.error is not None]
    error = f"  error {_mean(errors):.4f}" if errors else ""
    return f"block {block.index} {1 - kept / max(1, weights):.1%} zeros{error}"
