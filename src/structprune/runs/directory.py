"""The run's directory: work happens in `OUT.partial`, with a journal and a lock; success renames it to `OUT`."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from structprune.errors import InputError
from structprune.files import sync_directory

JOURNAL_NAME = "journal.jsonl"


class RunDirectory:
    """Staging directory of one run, held by one process.

    Raises InputError if `output` exists, or if another live process works on the same output. A partial directory
    that a killed run left behind is recognised by its journal and replaced; any other directory of that name is
    refused.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.staging = output.with_name(output.name + ".partial")

    def check(self) -> None:
        """Raise InputError if the output or the staging directory is in the way."""
        if self.output.exists():
            raise InputError(
                "the output directory exists", where=str(self.output), do="choose another -o, or remove it first"
            )
        if self.staging.exists() and any(self.staging.iterdir()) and not (self.staging / JOURNAL_NAME).exists():
            raise InputError(
                "the working directory exists and is not a run's", where=str(self.staging), do="move it away"
            )
        parent = next(p for p in self.output.absolute().parents if p.exists())
        if not os.access(parent, os.W_OK):
            raise InputError("the output's parent directory cannot be written", where=str(parent))

    def __enter__(self) -> RunDirectory:
        self.check()
        self.staging.mkdir(parents=True, exist_ok=True)
        self._journal = (self.staging / JOURNAL_NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._journal.close()
            raise InputError(
                "another process is writing this output", where=str(self.output), do="wait for it, or choose another -o"
            ) from None
        self._clear()
        return self

    def _clear(self) -> None:
        for path in self.staging.iterdir():
            if path.name == JOURNAL_NAME:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._journal.truncate(0)

    def record(self, event: str, **values: Any) -> None:
        """Append one line to the journal and sync it."""
        self._journal.write(json.dumps({"event": event, **values}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def commit(self, finished: Path) -> None:
        """Make the finished directory inside staging the output, and drop the rest."""
        finished.rename(self.output)
        sync_directory(self.output.parent)
        shutil.rmtree(self.staging)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.close()
        # Nothing half-written is left behind by an error or Ctrl-C; only a kill leaves the .partial directory.
        if kind is not None and self.staging.exists():
            shutil.rmtree(self.staging, ignore_errors=True)
