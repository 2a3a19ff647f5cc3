"""The block loop: read, measure, decide, solve, write, propagate; one block in memory at a time.

Shape suffixes: N windows, S positions, D hidden size, T tokens, U units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.calibration.snapshots import Snapshots
from structprune.calibration.store import HiddenStore
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.layerwise.block import BlockOutcome, pass_block, prune_block
from structprune.engine.layerwise.statistics import Streams
from structprune.engine.planning.forecast import output_config
from structprune.engine.planning.shapes import most_inputs
from structprune.engine.planning.widths import Widths, choose_widths
from structprune.engine.run.context import RunContext
from structprune.engine.run.finalize import Outcome, finalize
from structprune.engine.sensitivity.cache import SensitivityPass, measure_sensitivity
from structprune.engine.sensitivity.store import Costs, costs_path
from structprune.engine.streaming.activation_cache import ActivationCache
from structprune.engine.streaming.embed import embed, open_store
from structprune.engine.streaming.final_states import load_final_states, save_final_states
from structprune.memory import format_bytes, release_free_memory
from structprune.results.report import PruneReport
from structprune.results.schema import BlockReport
from structprune.runs.journal import Journal
from structprune.types import BlockLayout

SURVEY = "survey"
_COSTS_STEP = "prices"


def allocate(context: RunContext, costs: Costs | None) -> Widths:
    """Units to keep per block, for each kind in scope."""
    return choose_widths(context.stock, context.recipe, context.kinds, costs)


def execute(context: RunContext) -> PruneReport:
    """Prune block after block into the run's staging directory and turn it into the output.

    Raises NumericalError for weights or activations that are not finite, CheckpointError for unreadable tensors.
    """
    layout = context.stock.layout
    ranks = context.ranks
    found = measure_sensitivity(context, context.run.staging / SURVEY)
    costs = None if found is None else found.costs
    kept_units = ranks.broadcast(lambda: allocate(context, costs))
    # Before the long pass: what cannot be written is refused here.
    config = output_config(context.stock, context.recipe, context.kinds, kept_units)

    for iteration in range(context.recipe.outer_iterations):
        assert costs is not None
        folder = context.run.staging / f"outer-{iteration + 1}"
        costs = _updated_costs(costs, _rehearse(context, folder, found, kept_units, iteration + 1))
        kept_units = ranks.broadcast(partial(allocate, context, costs))
        config = output_config(context.stock, context.recipe, context.kinds, kept_units)

    writer = ModelWriter(context.run.shards, len(layout.blocks), layout.blocks_module, context.stored_name)
    trail = _Trail(folder=context.run.staging, journal=context.run.journal, writer=writer, measures_costs=False)
    result = _prune_blocks(context, trail, found, kept_units, "prune")
    outcome = Outcome(
        reports=[BlockReport(**report) for line in result.lines for report in line["reports"]],
        kept_indices={str(number): line["kept"] for number, line in enumerate(result.lines)},
        dense_NSD=result.final_states["dense"],
        pruned_NSD=result.final_states["pruned"],
        reused=None if found is None else found.reused,
    )
    sublayers = [(block, kind) for block in layout.blocks for kind in context.kinds if block.has(kind)]
    scope = sum(block.module_parameters(block.group(kind)) for block, kind in sublayers)
    return ranks.broadcast(lambda: finalize(context, writer, config, outcome, scope))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trail:
    """Where a pass over the blocks leaves what it has done, and finds what a process before it had."""

    folder: Path
    journal: Journal
    writer: ModelWriter
    measures_costs: bool
    """Whether removals have their costs measured again, on the pruned model's stream."""

    def leave(
        self, block: BlockLayout, outcome: BlockOutcome, num_keep: Mapping[str, int], peak_bytes: int
    ) -> Mapping[str, Any]:
        """Write the pruned block and record it, on the first rank. Returns the journal's line."""
        files = [self.writer.write_block(block.index, outcome.tensors)]
        if self.measures_costs:
            files.append(costs_path(self.folder, block.index))
            save_file({kind: cost_U.contiguous() for kind, cost_U in outcome.costs.items()}, files[-1])
        return self.journal.record(
            _step(block),
            files,
            dict(num_keep),
            tensors=list(outcome.tensors),
            reports=[report.model_dump(mode="json") for report in outcome.reports],
            kept=outcome.kept,
            peak_bytes=peak_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """One pass over the blocks."""

    lines: list[Mapping[str, Any]]
    """The journal's, of every block."""
    final_states: Mapping[str, Tensor]


def _rehearse(
    context: RunContext,
    folder: Path,
    found: SensitivityPass | None,
    kept_units: Widths,
    number: int,
) -> list[dict[str, Tensor]]:
    """A pass that nothing of the output comes from. Per block, kind -> cost of each removal on the pruned stream."""
    blocks = context.stock.layout.blocks
    with contextlib.closing(Journal(folder, context.observer.note, context.ranks)) as journal:
        writer = ModelWriter(folder, len(blocks), context.stock.layout.blocks_module)
        if journal.find(_COSTS_STEP) is None:
            trail = _Trail(folder=folder, journal=journal, writer=writer, measures_costs=True)
            _prune_blocks(context, trail, found, kept_units, f"outer iteration {number}")
            journal.record(_COSTS_STEP, [costs_path(folder, block.index) for block in blocks])
        if context.ranks.is_first:
            writer.remove()
        return [load_file(costs_path(folder, block.index)) for block in blocks]


def _prune_blocks(
    context: RunContext,
    trail: _Trail,
    found: SensitivityPass | None,
    kept_units: Widths,
    phase: str,
) -> _Pass:
    """The loop itself.

    What a process before this one did is taken over: up to the newest snapshot as it is; from there the streams pass
    the blocks that are written, and the first that is not is pruned.
    """
    blocks = context.stock.layout.blocks
    num_keep = [{kind: counts[block.index] for kind, counts in kept_units.items()} for block in blocks]
    lines = [trail.journal.find(_step(block), num_keep[block.index]) for block in blocks]
    for block, line in zip(blocks, lines, strict=True):
        if line is not None:
            trail.writer.adopt_block(block.index)
    final_states = load_final_states(trail.journal, trail.folder)
    if final_states is not None and None not in lines:
        return _Pass(lines=[line for line in lines if line is not None], final_states=final_states)
    num_windows = len(context.windows.ids_NS)
    num_dense = num_windows if context.follows_dense else context.num_probe
    ranks = context.ranks
    snapshots = Snapshots(trail.folder / "state", context.observer.note, ranks)
    kept = snapshots.behind([line is not None for line in lines])
    first = 0 if kept is None else kept.position
    with contextlib.ExitStack() as stack:
        store = open_store(context, trail.folder / "hidden.bin", num_windows)
        stack.callback(store.close)
        dense = open_store(context, trail.folder / "dense.bin", num_dense)
        stack.callback(dense.close)
        propagator = embed(context, {store: num_windows, dense: num_dense})
        if kept is not None:
            kept.restore({"pruned": store, "dense": dense})
        streams = Streams(propagator=propagator, pruned=store, dense=dense, cache=_open_cache(context))
        context.observer.start(phase, len(blocks) - first)
        for block in blocks[first:]:
            line = lines[block.index]
            if line is not None:
                tensors = trail.writer.read_block(block.index, line["tensors"])
                pass_block(context, block, tensors, num_keep[block.index], line["kept"], streams)
                del tensors
            else:
                sensitivity = {} if found is None else found.of_block(block.index)
                outcome = prune_block(
                    context, block, num_keep[block.index], streams, sensitivity, measure_costs=trail.measures_costs
                )
                peak_bytes = ranks.all_reduce_max(context.meter.peak_so_far())
                line = ranks.broadcast(partial(trail.leave, block, outcome, num_keep[block.index], peak_bytes))
                lines[block.index] = line
                del outcome
            snapshots.keep(block.index + 1, {"pruned": store, "dense": dense})
            release_free_memory()
            context.observer.advance(f"{_block_line(block, line)}  memory {format_bytes(context.meter.peak_so_far())}")
        final_states = {"dense": _first_windows(context, dense), "pruned": _first_windows(context, store)}
        save_final_states(trail.journal, trail.folder, final_states, ranks)
    snapshots.discard()
    return _Pass(lines=[line for line in lines if line is not None], final_states=final_states)


def _open_cache(context: RunContext) -> ActivationCache | None:
    """Room for the inputs of any sublayer that the plan lets stay in memory; none is touched yet."""
    if not context.plan.cached:
        return None
    num_windows, seq_len = context.windows.ids_NS.shape
    return ActivationCache(
        context.ranks.num_local(num_windows),
        seq_len,
        most_inputs(context.stock.layout, context.plan.cached),
        context.dtype,
    )


def _first_windows(context: RunContext, store: HiddenStore) -> Tensor:
    """The hidden states of the reported windows, on every rank."""
    windows = [
        context.ranks.broadcast_window(number, lambda own: store.read(own, own + 1).clone())
        for number in range(context.num_probe)
    ]
    return torch.cat(windows)


def _updated_costs(costs: Costs, found: Sequence[Mapping[str, Tensor]]) -> Costs:
    """The newest removal costs of every sublayer; one that was removed in the rehearsal keeps its old ones."""
    return {
        kind: [block.get(kind, cost_U) for block, cost_U in zip(found, old, strict=True)] for kind, old in costs.items()
    }


def _step(block: BlockLayout) -> str:
    return f"block {block.index}"


def _block_line(block: BlockLayout, line: Mapping[str, Any]) -> str:
    if not line["reports"]:
        return _step(block)
    report = BlockReport(**line["reports"][-1])
    error = "" if report.error is None else f"  error {report.error:.4f}"
    return f"block {report.block} {report.kind} {report.kept_units}/{report.num_units}{error}"
