"""The end of every recovery: shards, the held-out windows through what was written, reload check, report.

Shape suffixes: N windows, S positions, D hidden size, T tokens.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from structprune.architectures.sources.same_tokens import check_same_tokens
from structprune.architectures.stock.loading import has_own_modeling_file
from structprune.architectures.stock.model import StockModel
from structprune.calibration.select import fingerprint
from structprune.calibration.store import HiddenStore
from structprune.checkpoint.folder import FolderFiles, write_companions
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.readme import README_NAME
from structprune.checkpoint.weight_files import WeightFiles, tensors_around
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.planning.reload import RELOAD_TOKENS
from structprune.engine.run.finalize import MANIFEST_NAME, copy_outer, write_weights
from structprune.engine.run.reload_check import Probe, check_reload
from structprune.engine.run.versions import versions
from structprune.engine.streaming.divergence import Heads, divergence, load_heads
from structprune.engine.streaming.losses import last_states, summed_losses
from structprune.errors import NumericalError
from structprune.exporters.per_layer import write_modeling_file
from structprune.files import write_json, write_text
from structprune.memory import release_free_memory
from structprune.phases import by_name
from structprune.recipe.widths import WIDTHS_NAME
from structprune.results.memory import MemoryReport
from structprune.results.recovery import Quality, RecoveryReport, TextReport, recovery_card
from structprune.results.schema import REPORT_NAME, FilesReport
from structprune.runs.directory import RunDirectory
from structprune.training.context import Recovered, RecoveryContext, Workplace

RECOVERY_REPORT_NAME = "recovery_report.json"
_MAX_CARD_BYTES = 2**22


def write_recovered(
    context: RecoveryContext, recovered: Recovered, run: RunDirectory
) -> tuple[WeightFiles, FolderFiles]:
    """Write all files of the checkpoint in the student's format, the weights last; return what became of others."""
    streamed, directory = context.student, run.checkpoint
    blocks = streamed.stock.layout.blocks
    # In the student's names, whatever class they are of.
    form = streamed.stock.file_form(per_layer=False)
    writer = ModelWriter(run.shards, len(blocks), streamed.stock.layout.blocks_module, form)
    for block in blocks:
        tensors = recovered.tensors(block)
        writer.write_block(block.index, tensors)
        del tensors
        release_free_memory()
    copy_outer(streamed, writer)
    if has_own_modeling_file(streamed.reader.directory):
        write_modeling_file(directory, streamed.stock.family, streamed.reader.config)
    reader = streamed.reader
    beside = write_companions(reader.directory, directory, reader.output_config(reader.config), reader.weight_files)
    check_same_tokens(streamed.reader.directory, directory, streamed.stock.tokenizer_config)
    # Two tokenizers were there.
    release_free_memory()
    for name in (MANIFEST_NAME, REPORT_NAME, WIDTHS_NAME):
        if (streamed.reader.directory / name).is_file():
            shutil.copyfile(streamed.reader.directory / name, directory / name)
    files = writer.weight_files(context.settings.max_shard_size, tensors_around(reader))
    write_weights(files, directory, context.observer)
    return files, beside


def finalize_recovery(
    context: RecoveryContext,
    recovered: Recovered,
    run: RunDirectory,
    place: Workplace,
    *,
    student: str,
    teacher: str,
    notes: Sequence[str],
    started: float,
) -> RecoveryReport:
    """Write the checkpoint into the run's directory, measure it on the held-out windows, load it, report.

    Raises CheckpointError if the reload check fails, NumericalError for outputs that are not finite.
    """
    checkpoint = run.checkpoint
    files, beside = write_recovered(context, recovered, run)
    # Reads every header back and compares it with the config.
    written = replace(context.student, stock=StockModel(CheckpointReader(checkpoint)))
    held_out = context.texts.all_held_out
    context.observer.start("measure", 3)
    stores: list[HiddenStore] = []
    try:
        for name, streamed in (("dense", context.teacher), ("before", context.student), ("after", written)):
            stores.append(last_states(streamed.on_windows(held_out), place.scratch / f"{name}.bin"))
            context.observer.advance(name)
        dense, before, after = stores
        heads = load_heads(context.teacher, context.student)
        ids_NS = context.student.windows.ids_NS[list(held_out)]
        device = context.student.device
        dense_perplexity = _perplexity(heads.teacher, dense, ids_NS, device, "teacher")
        qualities = [
            Quality(
                perplexity=_perplexity(heads.student, store, ids_NS, device, name),
                divergence=_divergence(heads, store, dense, device),
            )
            for name, store in (("student", before), ("recovered student", after))
        ]
        probe = _probe(heads.student, after, ids_NS[0], device) if context.settings.reload_check else None
        del heads
    finally:
        for store in stores:
            store.close()
    release_free_memory()
    measured_peak = context.student.meter.peak_so_far()
    if qualities[1].divergence > qualities[0].divergence:
        context.observer.note("the held-out windows as a whole are met worse than before")
    reload = check_reload(written, run, files, probe, context.observer)
    plan = context.student.plan
    return RecoveryReport(
        output=str(run.output),
        student=student,
        teacher=teacher,
        notes=list(notes),
        student_fingerprint=context.student.reader.fingerprint(),
        teacher_fingerprint=context.teacher.reader.fingerprint(),
        settings=context.settings.model_dump(mode="json"),
        device=str(device),
        compute_dtype=str(context.student.dtype).removeprefix("torch."),
        texts=_text_reports(context, recovered),
        description=context.texts.windows.description,
        fingerprint=fingerprint(context.texts.windows.ids_NS),
        seq_len=context.texts.windows.ids_NS.shape[1],
        start=context.texts.windows.start,
        dense_perplexity=dense_perplexity,
        before=qualities[0],
        after=qualities[1],
        tokens=recovered.tokens,
        blocks=recovered.blocks,
        trace=recovered.trace,
        evaluations=recovered.evaluations,
        memory=MemoryReport(
            budget_bytes=plan.budget_bytes,
            planned_peak_bytes=plan.peak_bytes,
            measured_peak_bytes=measured_peak,
            phases=by_name(plan.phases),
            measured_phases=by_name(context.student.meter.phases),
            store=plan.store,
            micro_batch_windows=plan.micro_batch_windows,
        ),
        reload=reload,
        files=FilesReport(**asdict(beside)),
        train_seconds=recovered.train_seconds,
        wall_seconds=time.perf_counter() - started,
        versions=versions(),
    )


def write_report(report: RecoveryReport, student: Path, checkpoint: Path) -> None:
    """Write the report, and the student's model card with one more paragraph."""
    write_json(checkpoint / RECOVERY_REPORT_NAME, report.to_dict())
    write_text(checkpoint / README_NAME, _card(student / README_NAME) + recovery_card(report))


def _card(path: Path) -> str:
    """Read the student's model card, to go on behind it; a sentence where it is no text of a card's size."""
    if not path.is_file():
        return ""
    try:
        with path.open("rb") as handle:
            card = handle.read(_MAX_CARD_BYTES + 1)
        if len(card) <= _MAX_CARD_BYTES:
            return card.decode().rstrip() + "\n\n"
    except (OSError, UnicodeDecodeError):
        pass
    return "The README of the model before its recovery could not be read and is left out.\n\n"


def _text_reports(context: RecoveryContext, recovered: Recovered) -> list[TextReport]:
    texts = context.texts
    drawn = recovered.drawn or [len(part) for part in texts.train]
    total = max(1, sum(drawn))
    return [
        TextReport(name=name, train_windows=len(train), held_out_windows=len(held), share=count / total)
        for name, train, held, count in zip(texts.names, texts.train, texts.held_out, drawn, strict=True)
    ]


def _perplexity(head: nn.Module, store: HiddenStore, ids_NS: torch.Tensor, device: torch.device, which: str) -> float:
    mean = summed_losses(head, store, ids_NS, device) / ids_NS[:, 1:].numel()
    if not mean < 700:
        raise NumericalError(
            "the model's output on the held-out windows is NaN, infinite or absurdly large",
            where=which,
            do="use --dtype float32, or lower --learning-rate",
        )
    return math.exp(mean)


def _divergence(heads: Heads, found: HiddenStore, wanted: HiddenStore, device: torch.device) -> float:
    num_windows, seq_len, _ = found.shape
    total = sum(
        divergence(
            heads.student, heads.teacher, found.read(n, n + 1)[0].to(device), wanted.read(n, n + 1)[0].to(device)
        )
        for n in range(num_windows)
    )
    return total / (num_windows * seq_len)


@torch.no_grad()
def _probe(head: nn.Module, store: HiddenStore, ids_S: torch.Tensor, device: torch.device) -> Probe:
    """Compute what the reload check compares with: the logits at the start of the first held-out window."""
    logits_SV = head(store.read(0, 1)[0, :RELOAD_TOKENS].to(device))
    return Probe(ids_S=ids_S[:RELOAD_TOKENS].clone(), logits_SV=logits_SV.float().cpu())
