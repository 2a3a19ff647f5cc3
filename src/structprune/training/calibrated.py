"""Learning on windows of a run's calibration texts: the last ones of every text only measure."""

from __future__ import annotations

from dataclasses import replace

from structprune.architectures.stock.model import StockModel
from structprune.calibration.context import CalibrationWindows
from structprune.engine.run.context import RunContext
from structprune.engine.streaming.model import StreamedModel
from structprune.recipe.repaired import objective_of
from structprune.recipe.training import RecoverySettings, divided
from structprune.training.context import RecoveryContext
from structprune.training.texts import Texts


def on_calibration(
    context: RunContext, student: StockModel, settings: RecoverySettings, windows: CalibrationWindows
) -> RecoveryContext:
    """Let `student` learn from the dense model on windows of the run's calibration texts."""
    # Window by window: a run that goes on must not depend on how much memory was free at its start.
    teacher = StreamedModel(
        stock=context.stock,
        windows=windows,
        plan=replace(context.plan, micro_batch_windows=1),
        device=context.device,
        dtype=context.dtype,
        meter=context.meter,
    )
    by_text = [text.windows for text in windows.texts if text.windows] or [tuple(range(len(windows.ids_NS)))]
    train, measured = divided(by_text)
    return RecoveryContext(
        teacher=teacher,
        student=replace(teacher, stock=student),
        settings=settings.resolved(),
        texts=Texts(names=(context.calibration_name,), windows=teacher.windows, train=(train,), held_out=measured),
        targets=(),
        resident=context.plan.store == "memory",
        observer=context.observer,
        objective=objective_of(context.recipe),
    )
