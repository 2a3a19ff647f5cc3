"""The block loop: read, measure, decide, solve, write, propagate; one block in memory at a time.

Shape suffixes: N windows, S positions, D hidden size, T tokens, U units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from structprune.checkpoint.writer import CheckpointWriter
from structprune.engine.allotment import Kept, allot
from structprune.engine.block import prune_block
from structprune.engine.embed import embed, open_store
from structprune.engine.finish import Outcome, finish
from structprune.engine.foresight import output_config
from structprune.engine.job import Job
from structprune.engine.measure import Streams
from structprune.engine.observer import Observer
from structprune.engine.shared import Survey, survey_dense
from structprune.engine.walk import Costs
from structprune.memory import PeakMeter, format_bytes, release_free_memory
from structprune.report.schema import BlockReport, PruneReport
from structprune.runs.directory import RunDirectory

SURVEY = "survey"


def allocate(job: Job, costs: Costs | None) -> Kept:
    """Units to keep per block, for each kind in scope."""
    return allot(job.stock, job.recipe, job.kinds, costs)


def execute(job: Job, run: RunDirectory, meter: PeakMeter, observer: Observer) -> PruneReport:
    """Prune block after block into `run`'s staging directory and turn it into the output.

    Raises NumericalError for weights or activations that are not finite, CheckpointError for unreadable tensors.
    """
    layout = job.stock.layout
    staging = run.staging
    run.record("start", recipe=job.recipe.fingerprint(), source=job.reader.fingerprint())
    checkpoint = staging / "checkpoint"
    checkpoint.mkdir()
    found = survey_dense(job, staging / SURVEY, meter, observer)
    costs = None if found is None else found.costs
    kept_units = allocate(job, costs)
    # Before the long pass: what cannot be written is refused here.
    config = output_config(job.stock, job.recipe, job.kinds, kept_units)

    for iteration in range(job.recipe.outer_iterations):
        assert costs is not None
        rehearsal = _prune_blocks(
            job, run, found, None, kept_units, meter, observer, f"outer iteration {iteration + 1}"
        )
        costs = _repriced(costs, rehearsal.costs)
        kept_units = allocate(job, costs)
        config = output_config(job.stock, job.recipe, job.kinds, kept_units)

    writer = CheckpointWriter(checkpoint, len(layout.blocks) + 2, job.stored_name)
    result = _prune_blocks(job, run, found, writer, kept_units, meter, observer, "prune")
    halves = [(block, kind) for block in layout.blocks for kind in job.kinds if block.has(kind)]
    scope = sum(block.module_parameters(block.group(kind)) for block, kind in halves)
    return finish(job, run, writer, meter, observer, config, result.outcome, scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """One pass over the blocks."""

    outcome: Outcome
    costs: list[dict[str, Tensor]]
    """Per block, kind -> cost of each removal on the pruned stream; of a rehearsal only."""


def _prune_blocks(
    job: Job,
    run: RunDirectory,
    found: Survey | None,
    writer: CheckpointWriter | None,
    kept_units: Kept,
    meter: PeakMeter,
    observer: Observer,
    phase: str,
) -> _Pass:
    """The loop itself. Without a writer it is a rehearsal: nothing is written, and removals are priced again."""
    reports: list[BlockReport] = []
    kept_indices: dict[str, dict[str, list[int]]] = {}
    costs: list[dict[str, Tensor]] = []
    blocks = job.stock.layout.blocks
    num_windows = len(job.windows.ids_NS)
    num_dense = num_windows if job.follows_dense else job.num_probe
    with contextlib.ExitStack() as stack:
        store = open_store(job, run.staging / "hidden.bin", num_windows)
        stack.callback(store.close)
        dense = open_store(job, run.staging / "dense.bin", num_dense)
        stack.callback(dense.close)
        propagator = embed(job, {store: num_windows, dense: num_dense})
        streams = Streams(propagator=propagator, pruned=store, dense=dense)
        observer.start(phase, len(blocks))
        for block in blocks:
            num_keep = {kind: counts[block.index] for kind, counts in kept_units.items()}
            surveyed = {} if found is None else found.of_block(block.index)
            outcome = prune_block(job, block, num_keep, streams, surveyed, reprice=writer is None)
            if writer is not None:
                shard = writer.write(block.index + 2, {block.prefix + n: t for n, t in outcome.tensors.items()})
                run.record("block", index=block.index, shard=shard)
            reports.extend(outcome.reports)
            costs.append(outcome.costs)
            kept_indices[str(block.index)] = outcome.kept
            del outcome
            release_free_memory()
            line = _block_line(reports[-1]) if reports else f"block {block.index}"
            observer.advance(f"{line}  memory {format_bytes(meter.peak_so_far())}")
        return _Pass(
            outcome=Outcome(
                reports=reports,
                kept_indices=kept_indices,
                dense_NSD=dense.read(0, job.num_probe).clone(),
                pruned_NSD=store.read(0, job.num_probe).clone(),
                reused=None if found is None else found.reused,
            ),
            costs=costs,
        )


def _repriced(costs: Costs, found: Sequence[Mapping[str, Tensor]]) -> Costs:
    """The newest price of every half; one that was removed in the rehearsal keeps its old one."""
    return {
        kind: [block.get(kind, cost_U) for block, cost_U in zip(found, old, strict=True)] for kind, old in costs.items()
    }


def _block_line(report: BlockReport) -> str:
    error = "" if report.error is None else f"  error {report.error:.4f}"
    return f"block {report.block} {report.kind} {report.kept_units}/{report.num_units}{error}"
