"""Progress on standard error: a live bar on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from structprune.observer import Observer, SilentObserver


class _PlainObserver:
    """One line per step, with the time that is left as far as the steps so far tell."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def start(self, phase: str, total: int) -> None:
        self._phase, self._total, self._done, self._started = phase, total, 0, time.monotonic()

    def advance(self, detail: str) -> None:
        self._done += 1
        left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        print(f"{self._phase} {self._done}/{self._total}  {detail}  {left:.0f} s left", file=sys.stderr, flush=True)


class _BarObserver:
    """A rich progress bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def start(self, phase: str, total: int) -> None:
        self._task = self._progress.add_task(phase, total=total, detail="")

    def advance(self, detail: str) -> None:
        self._progress.update(self._task, advance=1, detail=detail)


def plain_observer(*, quiet: bool) -> Observer:
    """Return an observer that prints plain lines, also on a terminal: for a process whose children draw the bars."""
    return SilentObserver() if quiet else _PlainObserver()


@contextmanager
def progress_observer(*, quiet: bool) -> Generator[Observer]:
    """Yield the observer that fits the terminal."""
    if quiet:
        yield SilentObserver()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainObserver()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        yield _BarObserver(progress)
