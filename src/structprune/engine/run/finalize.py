"""The end of every run: perplexities, sizes, manifest, index, report.

Shape suffixes: N windows, S positions, D hidden size, T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from structprune.architectures.sources.resolve import hub_id, source_commit
from structprune.architectures.sources.same_tokens import check_same_tokens
from structprune.architectures.stock.model import StockModel
from structprune.calibration.select import fingerprint
from structprune.checkpoint.folder import FolderFiles, write_companions
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.readme import README_NAME, source_metadata
from structprune.checkpoint.weight_files import WeightFiles, tensors_around
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.planning.forecast import retyped, shape_of
from structprune.engine.planning.limits import Limit, limit_reports
from structprune.engine.planning.widths import Widths, block_widths
from structprune.engine.run.context import RunContext
from structprune.engine.run.final_metrics import FinalMetrics, final_metrics
from structprune.engine.run.held_out import measure_held_out
from structprune.engine.run.merged_rows import MergedRows, merge_rows
from structprune.engine.run.reload_check import check_reload
from structprune.engine.run.versions import versions
from structprune.engine.streaming.model import StreamedModel
from structprune.exporters.per_layer import write_modeling_file
from structprune.exporters.runtimes import runtimes
from structprune.files import write_json, write_text
from structprune.memory import release_free_memory
from structprune.observer import Observer
from structprune.phases import Phase, by_name
from structprune.recipe.path import PATH_NAME, RemovalPath
from structprune.recipe.repaired import merges_rows
from structprune.recipe.widths import WIDTHS_NAME, saved_widths
from structprune.report.card import model_card
from structprune.report.page import PAGE_NAME, prune_page
from structprune.report.rebuild import read_report
from structprune.results.gates import GatesReport
from structprune.results.memory import DeviceMemoryReport, MemoryReport, MemoryStretch
from structprune.results.report import PruneReport
from structprune.results.schema import (
    REPORT_NAME,
    AdapterReport,
    BlockReport,
    FilesReport,
    MergedRowsReport,
    ReloadReport,
    RepairReport,
    ReusedStatistics,
    RuntimeReport,
    VocabularyReport,
)
from structprune.results.search import SearchReport
from structprune.results.sizes import ReachableShares, SizeReport, ZerosReport
from structprune.results.texts import CalibrationReport, CalibrationText, HeldOutReport
from structprune.runs.contents import check_unchanged
from structprune.vocabulary.kept import KEPT_NAME

MANIFEST_NAME = "pruning_manifest.json"


def load_report(output: Path) -> PruneReport:
    """Read the report of a finished run. Raises InputError for a file that is not as it was written."""
    return read_report(output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a pass over the blocks left, beside the shards."""

    reports: list[BlockReport]
    kept_indices: Mapping[str, Any]
    """What the manifest says was kept of which block."""
    dense_NSD: Tensor
    """Last hidden states of the reported windows."""
    pruned_NSD: Tensor
    shares: ReachableShares | None
    """What share of the scope goes, beside the nearest that its units allow."""
    path: RemovalPath | None = None
    """What every width is predicted to cost; None where that was not measured."""
    predicted_loss: float | None = None
    """What the removals are predicted to add to the loss; None where that was not measured."""
    limits: Sequence[tuple[Limit, int]] = ()
    """What decided the widths where a share did not, each beside what the widths promise."""
    widths: Widths = field(default_factory=dict[str, list[int]])
    """Kind -> units that each block of the source keeps; empty where it keeps all."""
    reused: ReusedStatistics | None = None
    """What an earlier run had measured for this one."""
    gates: GatesReport | None = None
    """What was learned about which units stay; None: nothing was."""
    search: SearchReport | None = None
    """What a search over widths has found; None: there was none."""
    zeros: ZerosReport | None = None
    """Zeros that were put into matrices; None where whole units went."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All that is to be committed."""

    files: WeightFiles
    config: Mapping[str, Any]
    outcome: Outcome
    size: SizeReport
    metrics: FinalMetrics
    repair: RepairReport | None = None
    """None: there was none."""
    merged: MergedRowsReport | None = None
    """What came of merging rows; None: nobody asked."""


def finalize(
    context: RunContext,
    writer: ModelWriter,
    config: Mapping[str, Any],
    outcome: Outcome,
    scope_parameters: int,
) -> PruneReport:
    """Finish the run behind the last block's shard, where the tensors around the blocks stay as they are.

    `scope_parameters` is what `--sparsity` is a share of. All ranks call it, and get the report. Raises NumericalError
    if the outputs are not finite.
    """
    return commit(context, lambda: _with_outer(context, writer, config, outcome, scope_parameters))


def _with_outer(
    context: RunContext,
    writer: ModelWriter,
    config: Mapping[str, Any],
    outcome: Outcome,
    scope_parameters: int,
) -> Result:
    """Copy what lies around the blocks, repair them if that is asked for, and measure the calibration text."""
    release_free_memory()
    with context.meter.phase(Phase.COPY_OUTER):
        copy_outer(context, writer)
    if context.recipe.per_layer:
        write_modeling_file(context.run.checkpoint, context.stock.family, config)
    repair: RepairReport | None = None
    if context.repair is not None:
        repaired = context.repair.run(context, writer, config)
        writer, config, repair = repaired.writer, repaired.config, repaired.report
        if repaired.pruned_NSD is not None:
            outcome = replace(outcome, pruned_NSD=repaired.pruned_NSD)
    rows: MergedRows | None = None
    if merges_rows(context.recipe):
        rows = merge_rows(context, writer, config)
        writer = rows.writer
        if rows.pruned_NSD is not None:
            outcome = replace(outcome, pruned_NSD=rows.pruned_NSD)
    release_free_memory()
    with context.meter.phase(Phase.PERPLEXITY):
        metrics = final_metrics(context, outcome.dense_NSD, outcome.pruned_NSD, None if rows is None else rows.stock)
    removed = context.stock.layout.num_parameters - writer.num_parameters
    files = writer.weight_files(context.recipe.max_shard_size, tensors_around(context.reader))
    size = size_report(context, files, outcome, removed_in_blocks=removed, scope_parameters=scope_parameters)
    return Result(
        files=files,
        config=config,
        outcome=outcome,
        size=size,
        metrics=metrics,
        repair=repair,
        merged=None if rows is None else rows.report,
    )


def copy_outer(model: StreamedModel, writer: ModelWriter) -> None:
    """Copy what lies outside the blocks, one tensor at a time where it matters: embeddings first, the rest last."""
    outer = model.stock.layout.outer_tensors
    embeddings = model.stock.embedding_tensors()
    writer.write_embeddings(model.reader.read(embeddings))
    release_free_memory()
    writer.write_rest(model.reader.read([name for name in outer if name not in embeddings]))


def write_weights(files: WeightFiles, directory: Path, observer: Observer) -> None:
    """Put the weight files together; the run's shards stay until the directory has its name."""
    observer.start("write files", len(files.files))
    files.write(directory, observer.advance)


def size_report(
    context: RunContext, files: WeightFiles, outcome: Outcome, *, removed_in_blocks: int, scope_parameters: int
) -> SizeReport:
    """Report sizes before and after; the two parts of what was removed may differ in sign."""
    layout, tokens = context.stock.layout, context.reader.fewer_tokens
    before = layout.all_parameters + (0 if tokens is None else tokens.parameters)
    return SizeReport(
        parameters_before=before,
        parameters_after=files.num_parameters,
        bytes_before=context.reader.file_bytes,
        bytes_after=files.num_bytes,
        dtypes=files.dtype_names,
        removed_share_of_scope=removed_in_blocks / max(1, scope_parameters),
        reachable=outcome.shares,
        removed_share_of_blocks=removed_in_blocks / layout.block_parameters,
        removed_share_of_model=(before - files.num_parameters) / before,
        parameters_around=layout.around.parameters,
    )


def commit(context: RunContext, finish: Callable[[], Result]) -> PruneReport:
    """Write what `finish` returns, load it, measure it on held-out windows, report, and make it the output.

    All ranks call it, and get the report; `finish` is called on the first one.
    """
    ranks = context.ranks
    made: list[_Written] = []
    ranks.broadcast(lambda: made.append(_written(context, finish())))
    model = made[0].model if made else StockModel(CheckpointReader(context.run.checkpoint))
    held_out = measure_held_out(context, model)
    return ranks.broadcast(lambda: _complete(context, made[0], held_out))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """A result in the run's directory, with its weights and without its report."""

    result: Result
    beside: FolderFiles
    model: StockModel
    reload: ReloadReport


def _written(context: RunContext, result: Result) -> _Written:
    """Write all but the report, and load it: what does not load, or predicts otherwise, is measured no further."""
    beside = _write_files(context, result)
    # Reads every header back and compares it with the new config: what was written is what stock code expects.
    model = StockModel(CheckpointReader(context.run.checkpoint))
    context.meter.mark("write files")
    with context.meter.paused():
        reload = check_reload(context, context.run, result.files, result.metrics.probe, context.observer)
    return _Written(result=result, beside=beside, model=model, reload=reload)


def _write_files(context: RunContext, result: Result) -> FolderFiles:
    """Write config, companions and weights; the manifest and what a reader is told come when all is measured."""
    checkpoint, config = context.run.checkpoint, result.config
    if (start := context.run.start) is not None:
        check_unchanged(context.reader.content_files, start["source_contents"])
    beside = write_companions(
        context.reader.directory,
        checkpoint,
        context.reader.output_config(config),
        context.reader.weight_files,
        same_width=config.get("hidden_size") == context.reader.config.get("hidden_size"),
    )
    check_same_tokens(context.reader.directory, checkpoint, context.stock.tokenizer_config)
    # Two tokenizers were there.
    release_free_memory()
    write_weights(result.files, checkpoint, context.observer)
    return beside


def _complete(context: RunContext, written: _Written, held_out: HeldOutReport | None) -> PruneReport:
    """Write the manifest, report and card, and make it the output."""
    checkpoint, result = context.run.checkpoint, written.result
    calibration = _calibration_report(context, result.metrics)
    manifest = {
        "structprune": versions()["structprune"],
        "recipe": context.recipe.model_dump(mode="json"),
        "source_fingerprint": context.reader.fingerprint(),
        "held_out": None if held_out is None else held_out.model_dump(mode="json"),
        "calibration": calibration.model_dump(mode="json"),
        "kept_indices": result.outcome.kept_indices,
        "versions": versions(),
    }
    write_json(checkpoint / MANIFEST_NAME, manifest)
    write_json(checkpoint / WIDTHS_NAME, saved_widths(block_widths(context.stock, result.outcome.widths)))
    if context.recipe.vocabulary:
        merged = result.merged is not None and result.merged.changed
        kept = context.recipe.vocabulary.model_copy(update={"merged_rows": merged})
        write_json(checkpoint / KEPT_NAME, kept.model_dump(mode="json"))
    if result.outcome.path is not None:
        write_json(checkpoint / PATH_NAME, result.outcome.path.model_dump(mode="json"))
    context.meter.mark("finish")
    # The shape of what lies there, not of what was planned.
    shape = shape_of(written.model, context.recipe, result.config)
    layout, adapter, tokens = context.stock.layout, context.reader.adapter, context.reader.fewer_tokens
    report = PruneReport(
        output=str(context.run.output),
        source=context.source,
        source_fingerprint=context.reader.fingerprint(),
        source_commit=source_commit(context.reader.directory),
        adapter=None if adapter is None else AdapterReport(**asdict(adapter)),
        vocabulary=None if tokens is None else VocabularyReport(**asdict(tokens), merged=result.merged),
        family=layout.family,
        method=context.method.name,
        recipe=context.recipe,
        device=str(context.device),
        compute_dtype=str(context.dtype).removeprefix("torch."),
        held_out=held_out,
        calibration=calibration,
        size=result.size,
        zeros=result.outcome.zeros,
        predicted_loss=result.outcome.predicted_loss,
        limits=limit_reports(result.outcome.limits, written.model, result.size),
        memory=_memory_report(context),
        blocks=result.outcome.reports,
        reused=result.outcome.reused,
        gates=result.outcome.gates,
        search=result.outcome.search,
        repair=result.repair,
        reload=written.reload,
        num_ranks=context.ranks.size,
        runtimes=[RuntimeReport(**asdict(support)) for support in runtimes(shape)],
        notes=(*layout.notes, *retyped(layout.config, written.model.layout.config)),
        files=FilesReport(**asdict(written.beside)),
        same_tokens=True,
        wall_seconds=time.perf_counter() - context.started,
        versions=versions(),
    )
    write_json(checkpoint / REPORT_NAME, report.to_dict())
    write_text(checkpoint / PAGE_NAME, prune_page(report))
    source = source_metadata(context.reader.directory, context.reader.config)
    write_text(checkpoint / README_NAME, model_card(report, source, hub_id(context.source)))
    context.run.commit()
    return report


def _calibration_report(context: RunContext, metrics: FinalMetrics) -> CalibrationReport:
    return CalibrationReport(
        name=context.calibration_name,
        description=context.windows.description,
        start=context.windows.start,
        fingerprint=fingerprint(context.windows.ids_NS),
        num_windows=context.windows.ids_NS.shape[0],
        seq_len=context.windows.ids_NS.shape[1],
        perplexity_windows=context.num_probe,
        dense_perplexity=metrics.dense_perplexity,
        pruned_perplexity=metrics.pruned_perplexity,
        texts=[
            CalibrationText(
                name=text.name, description=text.description, weight=text.weight, num_windows=len(text.windows)
            )
            for text in context.windows.texts
        ],
    )


def _memory_report(context: RunContext) -> MemoryReport:
    return MemoryReport(
        budget_bytes=context.plan.budget_bytes,
        planned_peak_bytes=context.plan.peak_bytes,
        measured_peak_bytes=max(context.meter.peak_so_far(), context.run.journal.largest("peak_bytes")),
        phases=by_name(context.plan.phases),
        measured_phases=by_name(context.meter.phases),
        store=context.plan.store,
        micro_batch_windows=context.plan.micro_batch_windows,
        cached=list(context.plan.cached),
        cache_bytes=context.plan.cache_bytes,
        timeline=[MemoryStretch(**asdict(sample)) for sample in context.meter.samples],
        device=None
        if (plan := context.plan.device) is None
        else DeviceMemoryReport(
            budget_bytes=plan.budget_bytes,
            planned_peak_bytes=plan.peak_bytes,
            measured_peak_bytes=context.device_meter.peak_bytes(),
            phases=by_name(plan.phases),
            sums=plan.sums,
            solves=plan.solves,
        ),
    )
