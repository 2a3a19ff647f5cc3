"""Standard output and error that may be full, closed or of another encoding: no reason for a finished run to fail."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Iterable
from typing import Any, TextIO


class _Forgiving:
    """A stream whose writes do not raise; the first error that the system reported is kept.

    Characters that its encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except OSError as error:
                self.error = error
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def forgiving_streams() -> Generator[None]:
    """Let a standard output that cannot be written cost a word on standard error, and nothing else."""
    before = sys.stdout, sys.stderr
    streams: list[Any] = [stream and _Forgiving(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in filter(None, streams):
            stream.flush()
        out, err = streams
        if out is not None and out.error is not None and err is not None:
            err.write(f"structprune: standard output cannot be written ({out.error.strerror}); what was done stands\n")
            err.flush()
        sys.stdout, sys.stderr = before
        for stream in filter(None, streams):
            if stream.error is not None:
                _silence(stream)


def _silence(stream: Any) -> None:
    """Send what is still buffered to nowhere, so that the interpreter does not fail on it at its end."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
