"""Which whole blocks go: by the turn of the residual stream over a run of them, or by the loss without each.

Shape suffixes: B windows of one micro-batch, N windows, S positions, D hidden size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from structprune.calibration.store import HiddenStore
from structprune.engine.passes import BlockPass, Carried, Line, PassState, Visited, run_pass
from structprune.engine.run.context import RunContext
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.candidates import PASSED_BY, Candidate, CandidateStreams, Round
from structprune.engine.streaming.losses import summed_losses
from structprune.errors import NumericalError
from structprune.phases import Phase
from structprune.registry import Registry
from structprune.scores.blocks import angular_distance
from structprune.types import BlockLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which blocks go."""

    removed: frozenset[int]
    statistics: Mapping[int, dict[str, float]]
    """Block -> what was measured of it, for the report."""


Choose = Callable[[RunContext, int], Choice]
"""(context, blocks to remove, folder for hidden states) -> the blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScore:
    """A choice of the whole blocks that go."""

    choose: Choose
    compares: Literal["boundaries", "losses"]
    """What it chooses by: hidden states at two boundaries of all windows, or the loss of a few without each block."""


BLOCK_SCORES: Registry[BlockScore] = Registry(
    "block score",
    BlockScore,
    {
        "angular": "structprune.engine.pipelines.depth_choice:ANGULAR",
        "measured-loss": "structprune.engine.pipelines.depth_choice:MEASURED_LOSS",
    },
)


@torch.no_grad()
def choose_angular(context: RunContext, num_remove: int) -> Choice:
    """Choose the `num_remove` consecutive blocks whose input and output are at the smallest mean angular distance.

    The hidden states of all windows at the last `num_remove` + 1 boundaries are stored, in a ring of stores. What is
    measured is the residual stream itself, also behind the last block (stock `output_hidden_states` gives that one
    behind the final norm).
    """
    blocks = context.stock.layout.blocks
    num_windows = len(context.windows.ids_NS)
    protect_first, protect_last = context.protected
    ring = [f"border-{slot}" for slot in range(num_remove + 1)]

    def visit(block: BlockLayout, state: PassState) -> Visited:
        before, after = (state.stores[ring[(block.index + step) % len(ring)]] for step in (0, 1))
        first = block.index + 1 - num_remove
        module = load_block(context, block)[1]
        total = 0.0
        with state.propagator.writing(after) as put:
            for start, stop, hidden_BSD in state.propagator.read(before, 0, num_windows):
                output_BSD = state.propagator.apply(module, block.index, hidden_BSD)
                put(start, output_BSD)
                if first >= protect_first:
                    input_BSD = state.propagator.fetch(state.stores[ring[first % len(ring)]], start, stop)
                    total += float(angular_distance(input_BSD, output_BSD).sum(dtype=torch.float64))
        if first < protect_first:
            return Visited(carried=state.carried)
        distance = total / context.windows.ids_NS.numel()
        distances = {**state.carried.values["distances"], str(first): distance}
        return Visited(values={"first": first, "distance": distance}, carried=Carried(values={"distances": distances}))

    def describe(block: BlockLayout, line: Line) -> str:
        if not line:
            return f"block {block.index}"
        return f"blocks {line['first']} to {block.index}  distance {line['distance']:.4f}"

    result = run_pass(
        context,
        BlockPass(
            name=str(Phase.ANGULAR_DISTANCES),
            journal=context.run.journal,
            stores=dict.fromkeys(ring, num_windows),
            embedded=ring[:1],
            blocks=blocks[: len(blocks) - protect_last],
            begin=lambda _: Visited(carried=Carried(values={"distances": {}})),
            visit=visit,
            describe=describe,
            records_blocks=False,
            snapshots="choice",
        ),
    )
    distances = {int(first): distance for first, distance in result.carried.values["distances"].items()}
    start = min(distances, key=lambda first: distances[first])
    return Choice(
        removed=frozenset(range(start, start + num_remove)),
        statistics={first: {"angular_distance": distance} for first, distance in distances.items()},
    )


# The one variant of a block that is there.
_KEPT = 0


@torch.no_grad()
def choose_measured_loss(context: RunContext, num_remove: int) -> Choice:
    """Choose one block after the other, each time the one without which the loss of the first windows is smallest.

    The models of a round, each without one block more, run together (`CandidateStreams`): they share what comes before
    their block, which halves the work.
    """
    num_windows = context.num_backward
    blocks = context.stock.layout.blocks
    protect_first, protect_last = context.protected
    may_go = range(protect_first, len(blocks) - protect_last)
    removed: list[int] = []
    statistics: dict[int, dict[str, float]] = {}

    def without(index: int) -> Candidate:
        return tuple(PASSED_BY if block.index in (index, *removed) else _KEPT for block in blocks)

    def build(block: BlockLayout, _: int) -> nn.Module:
        return load_block(context, block)[1]

    with contextlib.closing(
        CandidateStreams(
            context, context.observer, context.run.staging, num_stores=len(may_go), num_windows=num_windows
        )
    ) as streams:
        if streams.found is not None:
            removed = streams.found.values["removed"]
            statistics = {int(index): found for index, found in streams.found.values["statistics"].items()}
        for number in range(len(removed) + 1, num_remove + 1):
            candidates = {index: without(index) for index in may_go if index not in removed}
            found = streams.run(
                Round(
                    candidates=list(candidates.values()),
                    number=number - 1,
                    values={"removed": removed, "statistics": statistics},
                    description=f"measured loss, removal {number} of {num_remove}",
                ),
                build,
            )
            losses = _losses(context, {index: found[each] for index, each in candidates.items()}, num_windows)
            removed.append(min(losses, key=lambda index: losses[index]))
            for index, loss in losses.items():
                statistics[index] = {"loss_without": loss, "removal": float(number)}
        streams.discard()
    return Choice(removed=frozenset(removed), statistics=statistics)


def _losses(context: RunContext, streams: Mapping[int, HiddenStore], num_windows: int) -> dict[int, float]:
    """Compute the mean negative log-likelihood of the windows whose last hidden states are in each store."""
    head = context.stock.load_head(context.device, context.dtype)
    ids_NS = context.windows.ids_NS[:num_windows]
    losses: dict[int, float] = {}
    for index, store in streams.items():
        losses[index] = summed_losses(head, store, ids_NS, context.device) / ids_NS[:, 1:].numel()
        if not math.isfinite(losses[index]):
            raise NumericalError(
                "the loss is NaN or infinite", where=f"the model without block {index}", do="use --dtype float32"
            )
    return losses


ANGULAR = BlockScore(choose=choose_angular, compares="boundaries")
MEASURED_LOSS = BlockScore(choose=choose_measured_loss, compares="losses")
