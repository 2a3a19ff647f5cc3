"""The pipeline that removes whole blocks: measure, choose, then copy the rest under new numbers; one block at a time.

Nothing here belongs to units: a block is taken or left, so there is no allocation and nothing to solve.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from structprune.architectures.stock.model import StockModel
from structprune.calibration.snapshots import Snapshots
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.pipelines.counted_settings import num_to_remove, without_units
from structprune.engine.pipelines.depth_choice import BLOCK_SCORES, Choice
from structprune.engine.planning.forecast import Forecast, shape_of
from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.widths import check_shared_out
from structprune.engine.run.context import RunContext
from structprune.engine.run.finalize import Outcome, finalize
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.embed import embed, open_store
from structprune.engine.streaming.final_states import load_final_states, save_final_states
from structprune.errors import InputError, UnsupportedError
from structprune.exporters.depth import shallower_config
from structprune.memory import format_bytes, release_free_memory
from structprune.methods.method import Method
from structprune.recipe import Recipe, default_sensitivity_samples
from structprune.results.report import PruneReport
from structprune.results.schema import BlockReport
from structprune.types import ModelLayout


def num_removed(sparsity: float, layout: ModelLayout) -> int:
    """The smallest number of blocks, which are all alike, that holds at least `sparsity` of the blocks' parameters."""
    return num_to_remove(sparsity, len(layout.blocks))


def depth_settings(recipe: Recipe, method: Method, stock: StockModel) -> Recipe:
    """The recipe with every entry filled. Raises UnsupportedError for settings without a meaning for whole blocks.

    Raises InputError for an unknown score, or where fewer blocks may go than must.
    """
    score = BLOCK_SCORES.check(recipe.score or method.score)
    blocks = stock.layout.blocks
    if "scope" in recipe.model_fields_set and recipe.scope != "all":
        raise UnsupportedError(
            f"method {method.name!r} removes whole blocks", got=f"--scope {recipe.scope}", wanted="--scope all"
        )
    others = {} if score == "measured-loss" else {"sensitivity_samples": default_sensitivity_samples(recipe.seq_len)}
    fixed = without_units(recipe, method, f"whole blocks chosen by {score!r}", others)
    if any(block.shapes != blocks[0].shapes for block in blocks):
        raise UnsupportedError(
            "the source's blocks have different widths",
            wanted="equal blocks",
            do="remove blocks first, units afterwards",
        )
    remove = num_removed(recipe.sparsity, stock.layout)
    protect_first, protect_last = recipe.protect_first or 0, recipe.protect_last or 0
    free = len(blocks) - protect_first - protect_last
    if recipe.sparsity > 0 and free < 1:
        raise InputError(
            "every block is protected",
            got=f"--protect-first {protect_first}, --protect-last {protect_last}",
            wanted=f"fewer than {len(blocks)} together",
        )
    if remove > min(free, len(blocks) - 1):
        raise InputError(
            "no block would be left" if remove >= len(blocks) else "more blocks would have to go than are unprotected",
            got=f"sparsity {recipe.sparsity:g}, which is {remove} of {len(blocks)} blocks",
            wanted=f"at most {min(free, len(blocks) - 1)}",
            do="lower --sparsity or protect fewer blocks",
        )
    # What cannot be written is refused before anything is measured.
    shallower_config(stock.layout.config, stock.config, range(len(blocks) - remove))
    protect = {"protect_first": protect_first, "protect_last": protect_last}
    return fixed.model_copy(update={**protect, "scope": "all", "score": score})


def depth_request(request: PlanRequest, recipe: Recipe) -> PlanRequest:
    """The bytes' side of the pipeline: how many boundaries' hidden states are kept, and of how many windows."""
    remove = num_removed(recipe.sparsity, request.layout)
    free = len(request.layout.blocks) - (recipe.protect_first or 0) - (recipe.protect_last or 0)
    request = replace(request, needs_statistics=False)
    if remove == 0:
        return replace(request, num_windows=request.num_probe)
    if recipe.score == "measured-loss":
        return replace(request, num_windows=request.sensitivity_windows, num_stores=free + 1, compares="losses")
    return replace(request, num_stores=remove + 1, compares="boundaries")


def forecast_depth(stock: StockModel, recipe: Recipe, kinds: Sequence[str]) -> Forecast:
    """All of it: blocks are alike. Raises UnsupportedError where `tensor_parallel` processes could not share them."""
    check_shared_out(stock, recipe, {})
    layout = stock.layout
    remove = num_removed(recipe.sparsity, layout)
    config = shallower_config(layout.config, stock.config, range(len(layout.blocks) - remove))
    return Forecast(
        shape=shape_of(stock, recipe, config),
        kept=None,
        num_parameters=layout.num_parameters - remove * layout.blocks[0].num_parameters,
    )


def execute_depth(context: RunContext) -> PruneReport:
    """Choose the blocks that go and write the others into the run's staging directory.

    Raises NumericalError for weights or activations that are not finite, CheckpointError for unreadable tensors.
    """
    layout = context.stock.layout
    choice = _choose(context, num_removed(context.recipe.sparsity, layout))
    kept = [block.index for block in layout.blocks if block.index not in choice.removed]
    writer = ModelWriter(context.run.shards, len(kept), layout.blocks_module, context.stored_name)
    outcome = _write_blocks(context, writer, kept, choice)
    config = shallower_config(context.reader.config, context.stock.config, kept)
    return finalize(context, writer, config, outcome, layout.block_parameters)


def _choose(context: RunContext, remove: int) -> Choice:
    """The blocks that go, from the journal where a process before this one had chosen them."""
    line = context.run.journal.find("choice")
    if line is None:
        choice = Choice(removed=frozenset(), statistics={})
        if remove:
            choice = BLOCK_SCORES.get(context.score)(context, remove)
            assert len(choice.removed) == remove
            release_free_memory()
        line = context.run.journal.record("choice", removed=sorted(choice.removed), statistics=dict(choice.statistics))
    return Choice(
        removed=frozenset(line["removed"]),
        statistics={int(block): found for block, found in line["statistics"].items()},
    )


def _write_blocks(
    context: RunContext,
    writer: ModelWriter,
    kept: list[int],
    choice: Choice,
) -> Outcome:
    """Copy the blocks that stay under their new numbers; the reported windows pass all of them, and only those kept.

    What a process before this one did is taken over up to the newest snapshot; behind it no block is written twice.
    """
    blocks = context.stock.layout.blocks
    lines = [context.run.journal.find(f"block {block.index}") for block in blocks]
    for block, line in zip(blocks, lines, strict=True):
        if line is not None and block.index in kept:
            writer.adopt_block(kept.index(block.index))
    final_states = load_final_states(context.run.journal, context.run.staging)
    if final_states is not None and None not in lines:
        return _outcome(lines, kept, final_states)
    snapshots = Snapshots(context.run.staging / "state", context.observer.note)
    snapshot = snapshots.behind([line is not None for line in lines])
    first = 0 if snapshot is None else snapshot.position
    with contextlib.ExitStack() as stack:
        dense = open_store(context, context.run.staging / "dense.bin", context.num_probe)
        stack.callback(dense.close)
        pruned = open_store(context, context.run.staging / "pruned.bin", context.num_probe)
        stack.callback(pruned.close)
        propagator = embed(context, {dense: context.num_probe, pruned: context.num_probe})
        streams = {"dense": dense, "pruned": pruned}
        if snapshot is not None:
            snapshot.restore(streams)
        context.observer.start("write", len(blocks) - first)
        for block in blocks[first:]:
            started = time.perf_counter()
            tensors, module = load_block(context, block)
            propagator.run(module, block.index, dense)
            stays = block.index in kept
            if stays:
                propagator.run(module, block.index, pruned)
            if lines[block.index] is None:
                files: list[Path] = []
                if stays:
                    files.append(writer.write_block(kept.index(block.index), tensors))
                report = BlockReport(
                    block=block.index,
                    kind="block",
                    num_units=1,
                    kept_units=int(stays),
                    error_mask_only=None,
                    error=None,
                    status="ok" if stays else "removed",
                    statistics=choice.statistics.get(block.index, {}),
                    objective=[],
                    seconds=time.perf_counter() - started,
                )
                lines[block.index] = context.run.journal.record(
                    f"block {block.index}",
                    files,
                    report=report.model_dump(mode="json"),
                    peak_bytes=context.meter.peak_so_far(),
                )
            del tensors, module
            snapshots.keep(block.index + 1, streams)
            release_free_memory()
            state = "kept" if stays else "removed"
            context.observer.advance(f"block {block.index} {state}  memory {format_bytes(context.meter.peak_so_far())}")
        final_states = {
            "dense": dense.read(0, context.num_probe).clone(),
            "pruned": pruned.read(0, context.num_probe).clone(),
        }
        save_final_states(context.run.journal, context.run.staging, final_states)
    snapshots.discard()
    return _outcome(lines, kept, final_states)


def _outcome(lines: Sequence[Mapping[str, Any] | None], kept: list[int], final_states: Mapping[str, Tensor]) -> Outcome:
    """From the journal's line of every block."""
    return Outcome(
        reports=[BlockReport(**line["report"]) for line in lines if line is not None],
        kept_indices={"blocks": kept},
        dense_NSD=final_states["dense"],
        pruned_NSD=final_states["pruned"],
    )
