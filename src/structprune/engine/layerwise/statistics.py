"""Sums over calibration windows that one sublayer of a block is solved from.

Shape suffixes: B windows, S positions, D hidden size, T tokens, I consumer inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from torch import Tensor, nn

from structprune.calibration.store import HiddenStore
from structprune.engine.planning.shapes import most_inputs
from structprune.engine.run.context import RunContext, WindowRanges
from structprune.engine.streaming.activation_cache import ActivationCache, SolvedConsumer, put_inputs
from structprune.engine.streaming.propagate import Propagator, captured, check_finite, tapped
from structprune.linalg.gram_products import energy
from structprune.ranks import add_numbers
from structprune.types import BlockLayout, Moments, Stage, UnitGroup, UnitKind

Reference = Callable[[int, int], Tensor]
"""(start, stop) -> what is to be met for these windows, (B, S, D) on the device.

The stream behind the stage, or the consumer's output where that is normed before the sum.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """Hidden states of the calibration windows between two stages, and the loop that moves them on."""

    propagator: Propagator
    pruned: HiddenStore
    dense: HiddenStore
    """The dense model's: all windows where the target is the dense path, else the few whose perplexity is reported."""
    cache: ActivationCache | None = None
    """Where the plan has room for the inputs of a sublayer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sublayer:
    """One sublayer of a block, with the streams in front of it; measuring leaves the pruned stream where it is."""

    block: BlockLayout
    groups: Sequence[UnitGroup]
    """The only group of the sublayer, or one for every expert."""
    module: nn.Module
    """The block with the sublayer as it is to be measured."""
    streams: Streams
    reference: Reference | None = None
    """What the sublayer's output is to be; None: what it makes of the pruned stream."""
    inputs_NSI: Tensor | None = None
    """Room for the consumer's inputs; None: they are not kept."""

    @property
    def kind(self) -> UnitKind:
        """The kind of all groups."""
        return self.groups[0].kind


def measure(
    context: RunContext, sublayer: Sublayer, windows: WindowRanges, owners: Mapping[str, int] | None = None
) -> dict[str, Moments]:
    """Group name -> sums of the consumer's inputs in the pruned stream, and with a reference of its targets.

    Over some of this rank's windows, by their ranges, for all groups of the sublayer at once, and over the ranks:
    each group at the rank that `owners` names (the first without it), and only there among the results. The stage
    runs without the consumers, which leaves the residual; the target is the reference minus that, minus the
    consumer's bias. Neither stream is moved, unless the reference does it. The inputs themselves are written to
    `inputs_NSI`, if there is room. An expert gets the tokens that are sent to it, each times the router's weight.
    Before a norm each token's x and y are divided by the root mean square of the wanted output: what is added is
    linear in them then.
    """
    block, groups, module, streams = sublayer.block, sublayer.groups, sublayer.module, sublayer.streams
    reference, inputs_NSI, owners = sublayer.reference, sublayer.inputs_NSI, owners or {}
    inputs: dict[str, Tensor] = {}
    assert reference is None or len(groups) == 1, "what one of several groups is to add is not known"
    num_outputs = 0 if reference is None else context.stock.layout.hidden_size
    accumulators = {
        group.name: context.accumulator(group.num_units * group.width, num_outputs=num_outputs) for group in groups
    }
    residual_energy, num_passed = 0.0, 0
    zeros = context.stock.adds_in_place(block.index, sublayer.kind)
    for start, stop, hidden_BSD in read_ranges(streams, windows):
        wanted_BSD = None if reference is None else reference(start, stop)
        with contextlib.ExitStack() as stack:
            stage = context.stock.stage_of(block.index, sublayer.kind)
            stack.enter_context(context.stock.stage(module, block.index, stage))
            for group in groups:
                receive = partial(inputs.__setitem__, group.name)
                stack.enter_context(tapped(module, group.consumer_module, receive, zeros=zeros))
            residual_BSD = streams.propagator.apply(module, block.index, hidden_BSD)
        residual_energy += float(energy(residual_BSD))
        num_passed += residual_BSD.shape[0] * residual_BSD.shape[1]
        while inputs:
            name, x_TI = inputs.popitem()
            if inputs_NSI is not None:
                put_inputs(inputs_NSI, start, x_TI)
            target_TD = None
            if wanted_BSD is not None:
                target_TD = consumer_target(groups[0], module, wanted_BSD, residual_BSD)
            if (eps := groups[0].output_norm_eps) is not None:
                # A normed sublayer has one group, so the tap is gone and the consumer in its place again.
                output_BSD = module.get_submodule(groups[0].consumer_module)(x_TI) if wanted_BSD is None else wanted_BSD
                scale_T1 = token_scale(output_BSD, eps)
                x_TI = x_TI / scale_T1
                target_TD = None if target_TD is None else target_TD / scale_T1
            accumulators[name].update(x_TI, target_TD)
    found: dict[str, Moments] = {}
    for name, accumulator in accumulators.items():
        owner = owners.get(name, 0)
        accumulator.reduce(context.ranks, owner)
        total_residual, passed = add_numbers(context.ranks, [residual_energy, num_passed], owner)
        if owner == context.ranks.rank:
            if accumulator.num_tokens < passed:
                # An expert's share of the tokens that pass the block.
                total_residual *= accumulator.num_tokens / passed
            found[name] = Moments(
                sum_I=accumulator.sum_I,
                num_tokens=accumulator.num_tokens,
                gram_II=accumulator.finalize(f"block {block.index} {name}"),
                target_OI=accumulator.target_OI,
                target_energy=None if reference is None else accumulator.target_energy,
                residual_energy=total_residual,
            )
    return found


def open_cache(context: RunContext) -> ActivationCache | None:
    """Reserve memory for the inputs of any sublayer that the plan caches; none of it is touched yet."""
    if not context.plan.cached:
        return None
    num_windows, seq_len = context.windows.ids_NS.shape
    return ActivationCache(
        context.ranks.num_local(num_windows),
        seq_len,
        most_inputs(context.stock.layout, context.plan.cached),
        context.dtype,
    )


def read_ranges(streams: Streams, windows: WindowRanges) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, pruned stream) of each micro-batch of the windows in these ranges."""
    for first, last in windows:
        yield from streams.propagator.read(streams.pruned, first, last)


def fill_inputs(
    inputs_NSI: Tensor, context: RunContext, block: BlockLayout, group: UnitGroup, module: nn.Module, streams: Streams
) -> None:
    """Compute what measuring leaves there: the consumer's inputs in the pruned stream, in equal micro-batches."""
    received: list[Tensor] = []
    zeros = context.stock.adds_in_place(block.index, group.kind)
    for start, _, hidden_BSD in read_ranges(streams, [*chain(*context.window_sets)]):
        with (
            context.stock.stage(module, block.index, context.stock.stage_of(block.index, group.kind)),
            tapped(module, group.consumer_module, received.append, zeros=zeros),
        ):
            streams.propagator.apply(module, block.index, hidden_BSD)
        put_inputs(inputs_NSI, start, received.pop())


def finish_stage(streams: Streams, consumer: SolvedConsumer, inputs_NSI: Tensor, index: int) -> None:
    """Move the pruned stream over a sublayer of block `index` whose consumer's inputs are kept.

    Raises NumericalError if the stream is not finite behind it.
    """
    propagator, store = streams.propagator, streams.pruned
    for start, stop in propagator.batches(0, store.shape[0]):
        output_BSD = consumer.added(store.read(start, stop), inputs_NSI[start:stop])
        check_finite(output_BSD, index)
        store.write(start, output_BSD)


def token_scale(output_BSD: Tensor, eps: float) -> Tensor:
    """Compute what an RMSNorm divides each token of `output_BSD` by, float32 (T, 1)."""
    energy_BS1 = output_BSD.float().square().mean(dim=-1, keepdim=True)
    return energy_BS1.add(eps).sqrt().reshape(-1, 1)


def consumer_target(group: UnitGroup, module: nn.Module, wanted_BSD: Tensor, residual_BSD: Tensor) -> Tensor:
    """Compute what the consumer's product should be, float32 (T, D)."""
    target_BSD = wanted_BSD.float()
    if not group.output_normed:
        target_BSD = target_BSD - residual_BSD.float()
    if group.output_scale != 1.0:
        target_BSD = target_BSD / group.output_scale
    if group.consumer_bias is not None:
        target_BSD = target_BSD - module.get_parameter(group.consumer_bias).float()
    return target_BSD.reshape(-1, target_BSD.shape[-1])


def follow_dense(
    context: RunContext,
    block: BlockLayout,
    stage: Stage,
    groups: Sequence[UnitGroup],
    module: nn.Module,
    streams: Streams,
) -> Reference:
    """Move the dense stream behind `stage` of the uncut block `module`: what its sublayers in `groups` are to meet.

    The output of a normed consumer is not in the stream: there the stream moves as the reference is asked, which must
    be once for each window.
    """
    if any(group.output_normed for group in groups):
        (group,) = groups
        return stage_output(context, block, group, module, streams, streams.dense, write=True)
    with context.stock.stage(module, block.index, stage):
        streams.propagator.run(module, block.index, streams.dense)

    return partial(streams.propagator.fetch, streams.dense)


def stage_output(
    context: RunContext,
    block: BlockLayout,
    group: UnitGroup,
    module: nn.Module,
    streams: Streams,
    store: HiddenStore,
    *,
    write: bool,
) -> Reference:
    """Return a function that runs `module` on windows of `store` and returns the output of the consumer of `group`.

    With `write` the store moves on as windows are asked for.
    """
    outputs: list[Tensor] = []

    def output(start: int, stop: int) -> Tensor:
        stage = context.stock.stage(module, block.index, context.stock.stage_of(block.index, group.kind))
        with stage, captured(module, group.consumer_module, outputs.append):
            hidden_BSD = streams.propagator.fetch(store, start, stop)
            stream_BSD = streams.propagator.apply(module, block.index, hidden_BSD)
        if write:
            with streams.propagator.writing(store) as put:
                put(start, stream_BSD)
        consumer_BSD = outputs.pop()
        return consumer_BSD if group.output_normed else stream_BSD

    return output
