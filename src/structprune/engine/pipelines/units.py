"""The pipeline that removes units: read, measure, decide, solve, write, propagate; one block in memory at a time.

Shape suffixes: N windows, S positions, D hidden size, T tokens, U units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from structprune.checkpoint.writer import ModelWriter
from structprune.engine.layerwise.block import pass_block, prune_block
from structprune.engine.layerwise.statistics import Streams, open_cache
from structprune.engine.passes import BlockPass, Line, PassState, Visited, run_pass
from structprune.engine.planning.forecast import output_config
from structprune.engine.planning.limits import find_limits
from structprune.engine.planning.widths import Widths, choose_widths, reachable_shares, removal_path, sublayers
from structprune.engine.run.context import Chosen, RunContext
from structprune.engine.run.finalize import Outcome, finalize
from structprune.engine.search.run import search_widths
from structprune.engine.sensitivity.cache import SensitivityPass, measure_sensitivity
from structprune.engine.sensitivity.store import SURVEY, Costs, costs_name, costs_path
from structprune.engine.streaming.final_states import first_windows
from structprune.methods.method import SensitivityKind
from structprune.recipe.path import RemovalPath
from structprune.recipe.units import ResolvedUnits
from structprune.results.report import PruneReport
from structprune.results.schema import BlockReport
from structprune.results.search import SearchReport
from structprune.runs.journal import Journal
from structprune.types import BlockLayout

_COSTS_STEP = "prices"


def allocate(context: RunContext, costs: Costs | None) -> Widths:
    """Choose how many units each block keeps, for each kind in scope."""
    return choose_widths(context.stock, context.settings(ResolvedUnits), context.kinds, costs)


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
    config = output_config(context.stock, context.settings(ResolvedUnits), context.kinds, kept_units)

    for iteration in range(context.settings(ResolvedUnits).outer_iterations):
        assert costs is not None
        folder = context.run.staging / f"outer-{iteration + 1}"
        costs = _updated_costs(costs, _rehearse(context, folder, found, kept_units, iteration + 1))
        kept_units = ranks.broadcast(partial(allocate, context, costs))
        config = output_config(context.stock, context.settings(ResolvedUnits), context.kinds, kept_units)

    search: SearchReport | None = None
    if context.settings(ResolvedUnits).searches:
        assert found is not None
        assert costs is not None
        searched = search_widths(context, found, costs, kept_units)
        kept_units, search = searched.widths, searched.report
        config = output_config(context.stock, context.settings(ResolvedUnits), context.kinds, kept_units)

    chosen: Chosen | None = None
    if context.choose_units is not None:
        assert found is not None
        assert costs is not None
        chosen = context.choose_units(context, costs, kept_units, found.folder)
        kept_units = chosen.widths
        config = output_config(context.stock, context.settings(ResolvedUnits), context.kinds, kept_units)

    writer = ModelWriter(context.run.shards, len(layout.blocks), layout.blocks_module, context.file_form)
    pruning = Pruning(
        journal=context.run.journal,
        writer=writer,
        widths=kept_units,
        measured=found,
        units=() if chosen is None else chosen.units,
    )
    result = run_pass(context, pruning_pass(context, pruning, "prune"))
    limits = find_limits(context.stock, context.recipe, context.kinds)
    outcome = Outcome(
        reports=[BlockReport(**report) for line in result.lines for report in line["reports"]],
        kept_indices={str(number): line["kept"] for number, line in enumerate(result.lines)},
        dense_NSD=result.final["dense"],
        pruned_NSD=result.final["pruned"],
        **({} if costs is None else _predictions(context, costs, kept_units, given=bool(chosen and chosen.units))),
        limits=[(limit, limit.predicted(kept_units)) for limit in limits],
        widths=kept_units,
        reused=None if found is None else found.reused,
        gates=None if chosen is None else chosen.report,
        search=search,
        shares=reachable_shares(context.stock, context.settings(ResolvedUnits), context.kinds, kept_units),
    )
    return finalize(context, writer, config, outcome, _scope_parameters(context))


def _scope_parameters(context: RunContext) -> int:
    return sum(block.module_parameters(group) for block, group in sublayers(context.stock, context.kinds))


def _predictions(context: RunContext, costs: Costs, kept_units: Widths, *, given: bool) -> dict[str, Any]:
    """Return what these widths and all others are predicted to cost, where that was measured by the loss.

    For units that are given nothing is predicted: the costs are those of the units that the method would remove.
    """
    if context.sensitivity is not SensitivityKind.LOSS:
        return {}
    chosen = (
        float(costs[group.kind][block.index][: group.num_units - kept_units[group.kind][block.index]].double().sum())
        for block, group in sublayers(context.stock, context.kinds)
    )
    path = RemovalPath(
        source=context.source,
        source_fingerprint=context.reader.fingerprint(),
        head_units=context.stock.head_units,
        scope_parameters=_scope_parameters(context),
        sublayers=removal_path(context.stock, context.settings(ResolvedUnits), context.kinds, costs),
    )
    return {"predicted_loss": None if given else sum(chosen), "path": path}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning:
    """What a pass that prunes goes by, and where it leaves what it has done."""

    journal: Journal
    writer: ModelWriter
    widths: Widths
    measured: SensitivityPass | None
    """What the dense model's measurements say of each block."""
    units: Sequence[Mapping[str, Sequence[int]]] = ()
    """Units that stay of each group, by block and name, where they are given; empty: the method chooses them."""
    measures_costs: bool = False
    """Whether removals have their costs measured again, on the pruned model's stream."""


def pruning_pass(context: RunContext, pruning: Pruning, name: str) -> BlockPass:
    """Describe the pass that prunes every block, with the streams of the pruned model and of the dense one."""
    blocks = context.stock.layout.blocks
    num_windows = len(context.windows.ids_NS)
    num_keep = [{kind: counts[block.index] for kind, counts in pruning.widths.items()} for block in blocks]
    cache = open_cache(context)

    def streams(state: PassState) -> Streams:
        return Streams(
            propagator=state.propagator, pruned=state.stores["pruned"], dense=state.stores["dense"], cache=cache
        )

    def visit(block: BlockLayout, state: PassState) -> Visited:
        sensitivity = {} if pruning.measured is None else pruning.measured.of_block(block.index)
        measures_costs = pruning.measures_costs
        result = prune_block(
            context,
            block,
            num_keep[block.index],
            streams(state),
            sensitivity,
            given=pruning.units[block.index] if pruning.units else {},
            measure_costs=measures_costs,
        )
        return Visited(
            tensors=result.tensors,
            files={costs_name(block.index): result.costs} if measures_costs else {},
            values={
                "tensors": list(result.tensors),
                "reports": [report.model_dump(mode="json") for report in result.reports],
                "kept": dict(result.kept),
            },
        )

    def replay(block: BlockLayout, line: Line, state: PassState) -> None:
        tensors = pruning.writer.read_block(block.index, line["tensors"])
        pass_block(context, block, tensors, num_keep[block.index], line["kept"], streams(state))

    def finish(state: PassState) -> dict[str, Tensor]:
        stores = {name: state.stores[name] for name in ("dense", "pruned")}
        return {name: first_windows(context.ranks, store, context.num_probe) for name, store in stores.items()}

    return BlockPass(
        name=name,
        journal=pruning.journal,
        stores={"pruned": num_windows, "dense": num_windows if context.follows_dense else context.num_probe},
        visit=visit,
        replay=replay,
        finish=finish,
        describe=_describe,
        writer=pruning.writer,
        given=num_keep,
    )


def _rehearse(
    context: RunContext, folder: Path, found: SensitivityPass | None, kept_units: Widths, number: int
) -> list[dict[str, Tensor]]:
    """Prune without an output. Per block, kind -> cost of each removal on the pruned stream."""
    blocks = context.stock.layout.blocks
    with contextlib.closing(Journal(folder, context.observer.note, context.ranks)) as journal:
        writer = ModelWriter(folder, len(blocks), context.stock.layout.blocks_module)
        if journal.find(_COSTS_STEP) is None:
            pruning = Pruning(journal=journal, writer=writer, widths=kept_units, measured=found, measures_costs=True)
            run_pass(context, pruning_pass(context, pruning, f"outer iteration {number}"))
            journal.record(_COSTS_STEP, [costs_path(folder, block.index) for block in blocks])
        if context.ranks.is_first:
            writer.remove()
        return [load_file(costs_path(folder, block.index)) for block in blocks]


def _updated_costs(costs: Costs, found: Sequence[Mapping[str, Tensor]]) -> Costs:
    """Return the newest removal costs of every sublayer; one that was removed in the rehearsal keeps its old ones."""
    return {
        kind: [block.get(kind, cost_U) for block, cost_U in zip(found, old, strict=True)] for kind, old in costs.items()
    }


def _describe(block: BlockLayout, line: Line) -> str:
    if not line["reports"]:
        return f"block {block.index}"
    report = BlockReport(**line["reports"][-1])
    error = "" if report.error is None else f"  error {report.error:.4f}"
    return f"block {report.block} {report.kind} {report.kept_units}/{report.num_units}{error}"
