"""Ctrl-C stays Ctrl-C, whatever a library makes of the exception, and SIGTERM is another Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import typer

from structprune.cli.progress import plain_observer, progress_observer
from structprune.errors import RankError
from structprune.observer import Observer
from structprune.ranks import launched
from structprune.runs.directory import RunDirectory

Report = TypeVar("Report")


class Interrupted(KeyboardInterrupt):
    """Interruption by a signal, whose number is an attribute."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_code(error: KeyboardInterrupt) -> int:
    """Return the exit code with which a shell reports the death by that signal."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


@contextmanager
def interruptible() -> Generator[None]:
    """Raise Interrupted for SIGINT and SIGTERM, also instead of any error that comes after one.

    The exception is raised wherever the interpreter is. Inside a native library it may come out as another one: slicing
    a safetensors file turns it into a ValueError. Where a signal is ignored or handled otherwise, nothing is changed.
    """
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        raise Interrupted(number)

    usual: tuple[tuple[int, Any], ...] = ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    ours = [(number, handler) for number, handler in usual if signal.getsignal(number) is handler]
    for number, _ in ours:
        signal.signal(number, note)
    try:
        yield
    except RankError:
        # A launcher interrupts the others when a rank dies; that one is what there is to say.
        raise
    except Exception:
        if seen:
            raise Interrupted(seen[0]) from None
        raise
    finally:
        for number, handler in ours:
            signal.signal(number, handler)


def run_or_say_how_to_resume(work: Callable[[Observer], Report], run: Path, *, quiet: bool) -> Report:
    """Run `work` with progress and return its report; an interrupt ends the program and says how to resume the run.

    With several ranks only the first one prints.
    """
    first = launched()[0] == 0
    try:
        with interruptible(), progress_observer(quiet=quiet or not first) as observer:
            return work(observer)
    except KeyboardInterrupt as error:
        if not first:
            raise typer.Exit(exit_code(error)) from None
        directory = RunDirectory.named(run)
        kept = directory.peek() is not None
        how = f"`structprune resume {directory.output}` goes on where it was" if kept else "nothing was written"
        typer.echo(f"structprune: interrupted; {how}", err=True)
        raise typer.Exit(exit_code(error)) from None


def run_cells(run: Callable[[Observer], Report], output: Path, *, quiet: bool) -> Report:
    """Run what fills a comparison's directory; end with a shell's code for an interrupt, which says how to go on."""
    try:
        with interruptible():
            return run(plain_observer(quiet=quiet))
    except KeyboardInterrupt as error:
        typer.echo(f"structprune: interrupted; what is done is in {output}, the same command goes on", err=True)
        raise typer.Exit(exit_code(error)) from None
