"""The steps of a distillation of the whole model: order, learning rate, measurements, snapshots, the best state.

A mode gives a `Student`. Everything that a step depends on follows from its number, the seed and the snapshot, so a run
that was cut ends where an uninterrupted one does, unless the clock decides.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel
from torch import Tensor

from structprune.errors import NumericalError
from structprune.memory import format_bytes
from structprune.results.recovery import Evaluation, TraceStep
from structprune.training.adam import course
from structprune.training.context import Recovered, RecoveryContext, Workplace
from structprune.training.mix import Mix, MixState
from structprune.training.snapshots import Snapshots
from structprune.types import BlockLayout

# Snapshots may take this share of the time, and come no sooner than this after one another.
_SNAPSHOT_SHARE = 0.04
_LEAST_PAUSE_S = 20.0
# The teacher reads each of its blocks once for so many steps; where the clock ends the run, for no more than will come.
_STEPS_AHEAD = 8
_BEST_NAME = "best"


class Student(Protocol):
    """A model that learns."""

    def step(self, windows: Sequence[int], rate: float, number: int) -> float:
        """Take step `number` (from 1) of the optimiser; return the mean loss per token before it."""
        ...

    def measure(self, windows: Sequence[int]) -> list[float]:
        """Measure the mean KL divergence per token of each of these windows."""
        ...

    def prepare(self, windows: Sequence[int]) -> None:
        """Prepare for these windows, which will be asked for soon."""
        ...

    def save(self, folder: Path, *, moments: bool) -> None:
        """Write the weights, and with `moments` what the optimiser keeps, into an empty folder."""
        ...

    def load(self, folder: Path, *, moments: bool) -> None:
        """Load what `save` wrote."""
        ...


class History(BaseModel):
    """What has happened so far; grows with every step."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    trace: list[TraceStep] = []
    evaluations: list[Evaluation] = []
    mix: MixState = MixState()

    @property
    def best(self) -> Evaluation:
        """The evaluation that the best state belongs to."""
        return min(self.evaluations, key=lambda entry: (entry.divergence, entry.step))


def distil(
    context: RecoveryContext,
    student: Student,
    place: Workplace,
    name: str = "recover",
    *,
    steps: int | None = None,
    loss_name: str = "KL",
) -> History:
    """Train until the windows or the time are used up; `student` then is the best state of all evaluations.

    `name` is that of the progress, and `loss_name` what a step lowers. With `steps` there are so many, instead of
    passes over all windows. The evaluations are at the start, whenever the windows have been passed once, and at the
    end. Raises NumericalError.
    """
    settings = context.settings
    snapshots, best = Snapshots(place.folder), place.scratch / _BEST_NAME
    history = History()
    mix = Mix(context.texts, robust=settings.mix == "robust", radius=settings.mix_radius, seed=settings.seed)
    if (newest := snapshots.newest(History)) is not None:
        student.load(newest[0], moments=True)
        history = newest[1]
        _link(newest[0] / _BEST_NAME, best)
        context.observer.note(f"going on after step {history.step} of an earlier run")
    per_pass = -(-len(context.texts.all_train) // settings.batch)
    total = settings.epochs * per_pass if steps is None else steps
    # The shares of the texts follow the measurements.
    interval = max(1, per_pass // 8) if settings.mix == "robust" else per_pass
    last = time.perf_counter()

    def clock() -> float:
        """Return the seconds of training so far, those of earlier runs included."""
        nonlocal last
        now = time.perf_counter()
        history.seconds += now - last
        last = now
        return history.seconds

    def evaluate() -> None:
        if history.evaluations and history.evaluations[-1].step == history.step:
            return
        with _moved(history):
            by_text = [_mean(student.measure(part)) for part in context.texts.held_out]
        found = Evaluation(
            step=history.step, seconds=clock(), divergence=context.objective.of(by_text), by_text=by_text
        )
        history.evaluations.append(found)
        history.mix = mix.judged(history.mix, by_text)
        context.observer.note(f"step {found.step}: KL {found.divergence:.4f} on the held-out windows")
        # The state at the start is on disk already: it is the student itself.
        if history.best is found and found.step:
            shutil.rmtree(best, ignore_errors=True)
            best.mkdir()
            student.save(best, moments=False)

    def save(folder: Path) -> None:
        student.save(folder, moments=True)
        _link(best, folder / _BEST_NAME)

    def keep() -> float:
        """Write a snapshot; the time of the next one."""
        started = time.perf_counter()
        clock()
        snapshots.write(history.step, history, save)
        now = time.perf_counter()
        return now + max(_LEAST_PAUSE_S, (now - started) / _SNAPSHOT_SHARE)

    if not history.evaluations:
        # A run that goes on was measured where an uninterrupted one is: another state could be the best.
        evaluate()
    next_snapshot = time.perf_counter() + _LEAST_PAUSE_S
    context.observer.start(name, total - history.step)
    limit = settings.limit_s
    first_step, begun = history.step, clock()

    def steps_ahead() -> int:
        """Return how many of the next steps to prepare for."""
        if limit is None:
            return _STEPS_AHEAD
        taken, spent = history.step - first_step, clock() - begun
        # Until a step was timed, nothing is known but that it comes.
        coming = math.ceil(taken * (limit - clock()) / spent) if taken else 1
        return max(1, min(_STEPS_AHEAD, coming))

    while history.step < total and (limit is None or clock() < limit):
        windows = mix.windows(history.mix, history.step, settings.batch)
        coming = range(history.step, min(total, history.step + steps_ahead()))
        student.prepare([w for step in coming for w in mix.windows(history.mix, step, settings.batch)])
        progress = max(history.step / total, 0.0 if limit is None else clock() / limit)
        rate = settings.learning_rate * course(history.step, settings.warmup, progress)
        with _moved(history):
            loss = student.step(windows, rate, history.step + 1)
        history.mix = mix.drawn(history.mix, windows)
        history.step += 1
        history.tokens += len(windows) * context.student.windows.ids_NS.shape[1]
        history.trace.append(TraceStep(step=history.step, seconds=clock(), loss=loss))
        if history.step % interval == 0:
            evaluate()
        spent = f"{history.seconds:.0f} s" if limit is None else f"{history.seconds:.0f} of {limit:.0f} s"
        context.observer.advance(
            f"{loss_name} {loss:.4f}  {spent}  memory {format_bytes(context.student.meter.peak_so_far())}"
        )
        if time.perf_counter() >= next_snapshot:
            next_snapshot = keep()
    evaluate()
    if history.best.step not in (0, history.step):
        student.load(best, moments=False)
    return history


@contextmanager
def _moved(history: History) -> Generator[None]:
    """Say of numbers that are not finite what caused them: once a step was taken, the steps."""
    try:
        yield
    except NumericalError as error:
        if not history.step:
            raise
        raise NumericalError(
            error.what, where=error.where, got=f"step {history.step + 1}", do="lower --learning-rate"
        ) from error


def recovered_by(history: History, tensors: Callable[[BlockLayout], Mapping[str, Tensor]]) -> Recovered:
    """Return what `distil` leaves, and the new tensors of each block."""
    return Recovered(
        tensors=tensors,
        blocks=[],
        trace=history.trace,
        evaluations=history.evaluations,
        tokens=history.tokens,
        drawn=history.mix.drawn,
        train_seconds=history.seconds,
    )


def _link(source: Path, target: Path) -> None:
    """Link the files of one folder, if there are any, into another one too; they are never changed in place."""
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            os.link(path, target / path.name)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
