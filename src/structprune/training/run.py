"""One recovery, from two checkpoints and a text to a finished directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from structprune.architectures.sources.fewer_tokens import open_with_tokens
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.model import StockModel
from structprune.calibration.context import WindowRequest
from structprune.checkpoint.folder import check_needed, sort_files
from structprune.engine.run.calibration import source_context
from structprune.engine.run.device import DTYPES, resolve_device, resolve_dtype
from structprune.engine.run.identity import check_same
from structprune.engine.streaming.model import StreamedModel
from structprune.errors import InputError
from structprune.files import read_json
from structprune.memory import PeakMeter, format_bytes
from structprune.observer import Observer
from structprune.phases import fullest
from structprune.recipe import Recipe
from structprune.recipe.training import RecoverySettings
from structprune.results.recovery import RecoveryReport
from structprune.runs.directory import RunDirectory, check_free_disk
from structprune.training import MODES
from structprune.training.context import (
    RecoveryContext,
    Workplace,
    check_pair,
    check_zeros,
    target_boundaries,
    teacher_notes,
)
from structprune.training.finalize import RECOVERY_REPORT_NAME, finalize_recovery, write_report
from structprune.training.plan import RecoveryPlan, plan_recovery
from structprune.training.snapshots import going_on
from structprune.training.texts import read_texts
from structprune.vocabulary.kept import KEPT_NAME, read_kept

_STATE_NAME = "recovery"
_PARTS = {
    "settings": "with other settings",
    "teacher": "with another teacher",
    "student": "from another student",
    "windows": "on another calibration text",
    "dtype": "in another dtype",
}


def open_teacher(model: str, adapter: str, student: StockModel) -> StockModel:
    """Open the teacher with the tokens that the student has kept, by the list that its run has left.

    Where that says that rows carry missing tokens, embedding and head are the student's: they do not learn, and what
    the teacher is to predict is what they make of its states. One with as many rows as the student has lost its tokens
    before: the list is of the model that it came from.
    """
    dense, path = StockModel(open_model(model, adapter=adapter)), student.reader.directory / KEPT_NAME
    if not path.is_file() or dense.layout.vocab_size == student.layout.vocab_size:
        return dense
    kept = read_kept(path)
    return StockModel(open_with_tokens(dense.reader, kept, student.reader if kept.merged_rows else None))


def recover_model(
    student: str | Path, teacher: str | Path, settings: RecoverySettings, output: str | Path, observer: Observer
) -> RecoveryReport:
    """Recover `student` from `teacher` into the new directory `output`; a run that was cut goes on.

    Raises a subclass of StructPruneError that says what to do; nothing half-written stays behind.
    """
    started = time.perf_counter()
    run = RunDirectory(Path(output), observer.note)
    run.check()
    mode = MODES.get(settings.mode)
    asked, settings = settings, settings.resolved()
    device = resolve_device(settings.device)
    pruned = StockModel(open_model(str(student), DTYPES.get(settings.output_dtype)))
    dense = open_teacher(str(teacher), settings.merge_adapter, pruned)
    check_needed(pruned.reader.directory, sort_files(pruned.reader.directory, pruned.reader.weight_files))
    check_pair(dense, pruned)
    check_zeros(settings.mode, keeps_zeros=mode.keeps_zeros, student=pruned)
    notes = teacher_notes(dense, pruned, settings.merge_adapter)
    for note in notes:
        observer.note(note)
    targets = target_boundaries(dense, pruned)
    mode.check(targets, pruned)
    dtype = resolve_dtype(Recipe.build(device=settings.device, dtype=settings.dtype), device)
    most = min(model.layout.max_positions for model in (dense, pruned))
    if settings.seq_len > most:
        raise InputError(
            "--seq-len is longer than the models' positions", got=settings.seq_len, wanted=f"at most {most}"
        )
    settings = settings.model_copy(update={"device": str(device), "dtype": str(dtype).removeprefix("torch.")})

    with PeakMeter() as meter:
        planned = plan_recovery(dense, pruned, settings, dtype, _most_windows(settings.calibration, settings))
        source = source_context(
            dense,
            WindowRequest(
                num_samples=settings.num_samples, seq_len=settings.seq_len, seed=settings.seed, bos=settings.bos
            ),
            dtype=dtype,
            device=device,
            budget_bytes=planned.plan.budget_bytes,
        )
        texts = read_texts(settings, source, observer.note)
        planned = plan_recovery(dense, pruned, settings, dtype, len(texts.windows.ids_NS))
        check_free_disk(run.output, planned.plan.disk_bytes)
        observer.note(_plan_line(planned))
        streamed = StreamedModel(
            stock=pruned, windows=texts.windows, plan=planned.plan, device=device, dtype=dtype, meter=meter
        )
        context = RecoveryContext(
            teacher=replace(streamed, stock=dense),
            student=streamed,
            settings=settings.model_copy(update={"calibration": texts.names}),
            texts=texts,
            targets=targets,
            resident=planned.resident,
            observer=observer,
        )
        with run:
            if run.start is None:
                run.begin(
                    **context.identity(),
                    student_path=str(student),
                    teacher_path=str(teacher),
                    asked=asked.model_dump(mode="json", exclude_unset=True),
                    directory=str(Path.cwd()),
                )
            else:
                check_same(run.start, context.identity(), run.staging, _PARTS)
                run.go_on()
            if run.is_committed():
                run.discard()
                return load_recovery_report(run.output)
            folder, scratch = run.staging / _STATE_NAME, run.staging / "scratch"
            folder.mkdir(exist_ok=True)
            place = Workplace(folder=folder, scratch=scratch)
            recovered = going_on(
                partial(mode.run, context, place),
                folder,
                scratch,
                lambda error: observer.note(f"{error}; the training begins anew"),
            )
            report = finalize_recovery(
                context, recovered, run, place, student=str(student), teacher=str(teacher), notes=notes, started=started
            )
            write_report(report, pruned.reader.directory, run.checkpoint)
            run.commit()
            return report


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryStart:
    """What the user asked for."""

    student: str
    teacher: str
    asked: RecoverySettings
    directory: str
    """Where relative paths count from."""


def find_recovery(run: RunDirectory) -> RecoveryStart | None:
    """Read what was asked of the recovery that was interrupted in this directory; None if there is none."""
    line = run.peek()
    if line is None or "student_path" not in line:
        return None
    return RecoveryStart(
        student=line["student_path"],
        teacher=line["teacher_path"],
        asked=RecoverySettings.build(**line["asked"]),
        directory=line["directory"],
    )


def load_recovery_report(output: Path) -> RecoveryReport:
    """Load the report of a finished recovery. Raises InputError if it is not as it was written."""
    path = output / RECOVERY_REPORT_NAME
    try:
        return RecoveryReport.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError("the file is not as it was written", where=str(path), got=str(error).splitlines()[0]) from None


def _most_windows(texts: Sequence[str], settings: RecoverySettings) -> int:
    """Bound the number of windows before the texts are read, which may have fewer."""
    return settings.num_samples * max(1, len(texts))


def _plan_line(planned: RecoveryPlan) -> str:
    plan = planned.plan
    states = "in memory" if plan.store == "memory" else "in a file"
    optimiser = "in memory" if planned.resident else "in files"
    return (
        f"memory: {format_bytes(plan.peak_bytes)} planned ({fullest(plan.phases)}) of "
        f"{format_bytes(plan.budget_bytes)}; "
        f"hidden states {states}, optimiser {optimiser}; disk {format_bytes(plan.disk_bytes)}"
    )
