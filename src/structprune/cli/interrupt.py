"""Ctrl-C stays Ctrl-C, whatever a library makes of the exception."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Generator[None]:
    """Raise KeyboardInterrupt for any error that comes after SIGINT.

    The exception is raised wherever the interpreter is. Inside a native library it may come out as another one: slicing
    a safetensors file turns it into a ValueError. Where SIGINT is ignored or handled otherwise, nothing is changed.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, previous)
