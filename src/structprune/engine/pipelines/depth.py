"""The pipeline that removes whole blocks: measure, choose, then copy the rest under new numbers; one block at a time.

Nothing here belongs to units: a block is taken or left, so there is no allocation and nothing to solve.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.passes import BlockPass, Line, PassState, Visited, run_pass
from structprune.engine.pipelines.counted_settings import counted_shares, num_to_remove
from structprune.engine.pipelines.depth_choice import BLOCK_SCORES, Choice
from structprune.engine.planning.forecast import Forecast, result_tensors, shape_of
from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.widths import Widths, check_shared_out
from structprune.engine.run.context import RunContext
from structprune.engine.run.finalize import Outcome, finalize
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.final_states import first_windows
from structprune.errors import InputError, UnsupportedError
from structprune.exporters.depth import check_numbers_can_change, shallower_config
from structprune.memory import release_free_memory
from structprune.methods.method import Method
from structprune.recipe import default_sensitivity_samples
from structprune.recipe.depth import DepthRecipe, ResolvedDepth
from structprune.results.report import PruneReport
from structprune.results.schema import BlockReport
from structprune.types import UNIT_KINDS, BlockLayout, ModelLayout, UnitKind


def num_removed(sparsity: float, layout: ModelLayout) -> int:
    """Return the smallest number of blocks with at least `sparsity` of all blocks' parameters; blocks are alike."""
    return num_to_remove(sparsity, len(layout.blocks))


def depth_settings(recipe: DepthRecipe, method: Method, stock: StockModel) -> ResolvedDepth:
    """Fill every entry of the recipe. Raises UnsupportedError for settings without a meaning for whole blocks.

    Raises InputError for an unknown score, or where fewer blocks may go than must.
    """
    score = BLOCK_SCORES.check(recipe.score or method.score)
    blocks = stock.layout.blocks
    if recipe.scope != "all":
        raise UnsupportedError(
            f"method {method.name!r} removes whole blocks", got=f"--scope {recipe.scope}", wanted="--scope all"
        )
    samples = default_sensitivity_samples(recipe.seq_len)
    if BLOCK_SCORES.get(score).compares != "losses" and recipe.sensitivity_samples not in (None, samples):
        raise UnsupportedError(
            f"--sensitivity-samples has no meaning for whole blocks chosen by {score!r}",
            got=recipe.sensitivity_samples,
            wanted="no --sensitivity-samples",
        )
    if stock.family.others:
        raise UnsupportedError(
            f"the blocks of {stock.family.name} are of different kinds, so none of them can be removed",
            got=f"block 0 and block {min(stock.family.others)}",
            do="prune units with another --method",
        )
    if any(block.shapes != blocks[0].shapes for block in blocks):
        raise UnsupportedError(
            "the source's blocks have different widths",
            wanted="equal blocks",
            do="remove blocks first, units afterwards",
        )
    remove = num_removed(recipe.sparsity, stock.layout)
    free = len(blocks) - recipe.protect_first - recipe.protect_last
    if recipe.sparsity > 0 and free < 1:
        raise InputError(
            "every block is protected",
            got=f"--protect-first {recipe.protect_first}, --protect-last {recipe.protect_last}",
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
    if remove:
        check_numbers_can_change(stock.family)
    shallower_config(stock.layout.config, stock.config, range(len(blocks) - remove))
    return ResolvedDepth.of(recipe, score=score, sensitivity_samples=recipe.sensitivity_samples or samples)


def depth_request(request: PlanRequest, recipe: ResolvedDepth) -> PlanRequest:
    """Complete the request: how many boundaries' hidden states the pipeline stores, and of how many windows."""
    remove = num_removed(recipe.sparsity, request.layout)
    free = len(request.layout.blocks) - recipe.protect_first - recipe.protect_last
    request = replace(request, needs_statistics=False)
    if remove == 0:
        return replace(request, num_windows=request.num_probe)
    compares = BLOCK_SCORES.get(recipe.score).compares
    if compares == "losses":
        return replace(
            request,
            num_windows=request.sensitivity_windows,
            num_stores=free,
            compares=compares,
            num_removed_blocks=remove,
        )
    return replace(request, num_stores=remove + 1, compares=compares, num_removed_blocks=remove)


def forecast_depth(stock: StockModel, recipe: ResolvedDepth, kinds: Sequence[UnitKind]) -> Forecast:
    """Forecast all of the result, since blocks are alike.

    Raises UnsupportedError where `tensor_parallel` processes could not share them.
    """
    check_shared_out(stock, recipe, {})
    layout = stock.layout
    remove = num_removed(recipe.sparsity, layout)
    config = shallower_config(layout.config, stock.config, range(len(layout.blocks) - remove))
    return Forecast(
        shape=shape_of(stock, recipe, config),
        kept=None,
        shares=counted_shares(recipe.sparsity, len(layout.blocks)),
        # Blocks are alike, so it does not matter which ones stay.
        tensors=result_tensors(
            stock,
            recipe,
            layout.blocks[: len(layout.blocks) - remove],
            lambda block: ((name, name, shape) for name, shape in block.shapes.items()),
        ),
    )


def execute_depth(context: RunContext) -> PruneReport:
    """Choose the blocks that go and write the others into the run's staging directory.

    Raises NumericalError for weights or activations that are not finite, CheckpointError for unreadable tensors.
    """
    layout = context.stock.layout
    choice = _choose(context, num_removed(context.recipe.sparsity, layout))
    kept = [block.index for block in layout.blocks if block.index not in choice.removed]
    writer = ModelWriter(context.run.shards, len(kept), layout.blocks_module, context.file_form)
    outcome = _write_blocks(context, writer, kept, choice)
    config = shallower_config(context.reader.config, context.stock.config, kept)
    return finalize(context, writer, config, outcome, layout.block_parameters)


def _choose(context: RunContext, remove: int) -> Choice:
    """Choose the blocks to remove, or read them from the journal if an earlier process chose them."""
    line = context.run.journal.find("choice")
    if line is None:
        choice = Choice(removed=frozenset(), statistics={})
        if remove:
            choice = BLOCK_SCORES.get(context.settings(ResolvedDepth).score).choose(context, remove)
            assert len(choice.removed) == remove
            release_free_memory()
        line = context.run.journal.record("choice", removed=sorted(choice.removed), statistics=dict(choice.statistics))
    return Choice(
        removed=frozenset(line["removed"]),
        statistics={int(block): found for block, found in line["statistics"].items()},
    )


def _write_blocks(context: RunContext, writer: ModelWriter, kept: list[int], choice: Choice) -> Outcome:
    """Copy the blocks that stay under their new numbers; the reported windows pass all of them, and only those kept."""
    numbers = {index: number for number, index in enumerate(kept)}

    def move(block: BlockLayout, state: PassState) -> dict[str, Tensor]:
        tensors, module = load_block(context, block)
        state.propagator.run(module, block.index, state.stores["dense"])
        if block.index in numbers:
            state.propagator.run(module, block.index, state.stores["pruned"])
        return tensors

    def visit(block: BlockLayout, state: PassState) -> Visited:
        started = time.perf_counter()
        tensors, stays = move(block, state), block.index in numbers
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
        return Visited(tensors=tensors if stays else None, values={"report": report.model_dump(mode="json")})

    def replay(block: BlockLayout, _: Line, state: PassState) -> None:
        move(block, state)

    def finish(state: PassState) -> dict[str, Tensor]:
        return {name: first_windows(context.ranks, store, context.num_probe) for name, store in state.stores.items()}

    result = run_pass(
        context,
        BlockPass(
            name="write",
            journal=context.run.journal,
            stores={"dense": context.num_probe, "pruned": context.num_probe},
            visit=visit,
            replay=replay,
            finish=finish,
            describe=lambda block, _: f"block {block.index} {'kept' if block.index in numbers else 'removed'}",
            writer=writer,
            output_index=lambda block: numbers.get(block.index),
        ),
    )
    return Outcome(
        reports=[BlockReport(**line["report"]) for line in result.lines],
        kept_indices={"blocks": kept},
        dense_NSD=result.final["dense"],
        pruned_NSD=result.final["pruned"],
        widths=_widths(context.stock.layout, kept),
        shares=counted_shares(context.recipe.sparsity, len(context.stock.layout.blocks)),
    )


def _widths(layout: ModelLayout, kept: Sequence[int]) -> Widths:
    """Count all units of the blocks that stay, and none of the others."""
    return {
        kind: [block.group(kind).num_units if block.index in kept and block.has(kind) else 0 for block in layout.blocks]
        for kind in UNIT_KINDS
    }
