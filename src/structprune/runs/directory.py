"""The run's directory: work happens in `OUT.partial`, with a journal and a lock; success renames it to `OUT`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from structprune.errors import InputError
from structprune.files import sync_directory, write_json
from structprune.memory import format_budget, format_bytes

JOURNAL_NAME = "journal.jsonl"
REJECTED_NAME = "REJECTED.json"


class RunDirectory:
    """Staging directory of one run, held by one process.

    Raises InputError if `output` exists, or if another live process works on the same output. A partial directory
    that a killed run left behind is recognised by its journal and replaced; any other directory of that name is
    refused. What is called as in `resumed` inside it survives kill and Ctrl-C, and is there for the next run.
    """

    def __init__(self, output: Path, resumed: Collection[str] = ()) -> None:
        self._resumed = frozenset(resumed)
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link that is in the way
        self.staging = self.output.parent / f"{self.output.name}.partial"
        self.rejected = self.output.parent / f"{self.output.name}.rejected"

    def check(self) -> None:
        """Raise InputError if the output or the staging directory is in the way."""
        check_absent(self.output, "output directory")
        if os.path.lexists(self.staging) and not self._is_ours():
            raise InputError(
                "the working directory exists and is not a run's", where=str(self.staging), do="move it away"
            )
        if os.path.lexists(self.rejected) and not (self.rejected / REJECTED_NAME).is_file():
            raise InputError(
                "the directory of rejected output exists and is not a run's",
                where=str(self.rejected),
                do="move it away",
            )
        parent = next(p for p in self.output.parents if os.path.lexists(p))
        if not parent.is_dir():
            raise InputError("the output lies below something that is not a directory", where=str(parent))
        if not os.access(parent, os.W_OK | os.X_OK):
            raise InputError("the output's parent directory cannot be written", where=str(parent))

    def _is_ours(self) -> bool:
        if self.staging.is_symlink() or not self.staging.is_dir():
            return False
        return (self.staging / JOURNAL_NAME).is_file() or not any(self.staging.iterdir())

    def __enter__(self) -> RunDirectory:
        self.check()
        self._new_parents = [p for p in self.output.parents if not p.exists()]
        self.staging.mkdir(parents=True, exist_ok=True)
        self._journal = (self.staging / JOURNAL_NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._journal.close()
            raise InputError(
                "another process is writing this output", where=str(self.output), do="wait for it, or choose another -o"
            ) from None
        try:
            self._clear()
        except OSError:
            self._journal.close()
            raise
        return self

    def _clear(self) -> None:
        for path in self.staging.iterdir():
            if path.name == JOURNAL_NAME or path.name in self._resumed:
                continue
            if path.is_dir() and not path.is_symlink():
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
        """Make the finished directory inside staging the output, and drop the rest. Raises InputError if it exists."""
        if os.path.lexists(self.output):
            raise InputError(
                "the output appeared while the run was working", where=str(self.output), do="choose another -o"
            )
        finished.rename(self.output)
        sync_directory(self.output.parent)
        shutil.rmtree(self.staging)

    def reject(self, finished: Path, why: Mapping[str, str]) -> Path:
        """Keep the directory, which turned out wrong, beside the output and marked; one rejected before makes room."""
        write_json(finished / REJECTED_NAME, dict(why))
        if self.rejected.exists():
            shutil.rmtree(self.rejected)
        finished.rename(self.rejected)
        sync_directory(self.output.parent)
        return self.rejected

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nothing half-written is left behind by an error or Ctrl-C; only a kill leaves the .partial directory, and
        # Ctrl-C where a next run could go on from it.
        goes_on = kind is KeyboardInterrupt and any((self.staging / name).exists() for name in self._resumed)
        if kind is not None and self.staging.exists() and not goes_on:
            shutil.rmtree(self.staging, ignore_errors=True)
            with contextlib.suppress(OSError):
                for parent in self._new_parents:
                    parent.rmdir()
        # Last: closing the journal gives up the lock.
        self._journal.close()


def check_absent(output: Path, what: str = "output file") -> None:
    """Raise InputError if there is something at `output`."""
    # lexists: a dangling link is in the way too.
    if os.path.lexists(output):
        raise InputError(f"the {what} exists", where=str(output), do="choose another -o, or remove it first")


def check_free_disk(output: Path, num_bytes: int) -> None:
    """Raise InputError unless `num_bytes` are free where `output` is to be, whose parents need not exist."""
    parent = next(p for p in Path(os.path.abspath(output)).parents if p.exists())  # noqa: PTH100 - as in RunDirectory
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise InputError(
            "not enough free disk for the output",
            where=str(parent),
            got=format_bytes(free),
            wanted=f"at least {format_budget(num_bytes)}",
            do="free some, or choose another -o",
        )
