"""The run's directory: work happens in `OUT.partial`, with a journal and a lock; success renames it to `OUT`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from structprune.errors import CheckpointError, DiskFullError, InputError, RankError, StructPruneError
from structprune.files import (
    check_path,
    is_disk_full,
    make_folder,
    read_json,
    remove_temporaries,
    sync_directory,
    write_json,
)
from structprune.memory import format_budget, format_bytes
from structprune.ranks import ALONE, Ranks
from structprune.runs.journal import JOURNAL_NAME, Journal, read_journal, silent

REJECTED_NAME = "REJECTED.json"
CHECKPOINT_NAME = "checkpoint"
SHARDS_NAME = "shards"
_EARLY_FOLDERS = (CHECKPOINT_NAME, SHARDS_NAME)
WINDOWS_NAME = "windows.safetensors"
_PARTIAL = ".partial"
_SPARE = len(".rejected")
_START, _COMMIT = "start", "commit"
# What a run's journal begins with, as bytes: a damaged first line is still known by them.
_FIRST_LINES = (b'{"step": "windows"', b'{"step": "start"')


class RunDirectory:
    """Staging directory of one run, held by one process.

    Raises InputError if `output` exists, or if another live process works on the same output. The state of a run that
    was cut stays in the staging directory, and the next process that enters finds it in the journal; without a first
    step there is none, and the directory is emptied. A directory of that name whose journal does not begin as a run's
    is somebody else's, and is refused.

    Of several ranks the first holds it, and its methods are called there only; the others read what lies in it.
    """

    def __init__(self, output: Path, notify: Callable[[str], None] = silent, ranks: Ranks = ALONE) -> None:
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow a link that is in the way
        self.staging = self.output.parent / f"{self.output.name}{_PARTIAL}"
        self.rejected = self.output.parent / f"{self.output.name}.rejected"
        self._notify = notify
        self._ranks = ranks
        self._accepted = False
        self._keep = False
        self._how_to_go_on = f"`structprune resume {self.output}` goes on where it was"

    @classmethod
    def named(cls, path: Path, notify: Callable[[str], None] = silent) -> RunDirectory:
        """Find a run's directory by its output or by its staging directory."""
        direct = cls(path, notify)
        name = direct.output.name.removesuffix(_PARTIAL)
        if direct.staging.exists() or name in ("", direct.output.name):
            return direct
        return cls(direct.output.with_name(name), notify)

    def check(self) -> None:
        """Raise InputError if the output or the staging directory is in the way, or cannot be made."""
        # Files beside it have longer names while they are written.
        check_path(self.output, "the output", spare=_SPARE)
        if not self.is_committed():
            check_absent(self.output, "output directory")
        if os.path.lexists(self.staging) and not self._is_ours():
            raise InputError(
                "the working directory exists and is not a run's", where=str(self.staging), do="move it away"
            )
        if os.path.lexists(self.rejected) and not _is_rejected(self.rejected):
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
        left = {path.name: path for path in self.staging.iterdir()}
        journal = left.pop(JOURNAL_NAME, None)
        if journal is None or not journal.is_file():
            return not left and journal is None
        if read_journal(journal) or _begins_a_run(journal):
            return True
        # Killed before the first step: nothing but what is made on the way to it.
        early = all(name == WINDOWS_NAME or (name in _EARLY_FOLDERS and _is_empty(left[name])) for name in left)
        return journal.stat().st_size == 0 and early

    def peek(self) -> Mapping[str, Any] | None:
        """Read the first step of the run that was interrupted here, without entering; None if none can be resumed."""
        return read_journal(self.staging / JOURNAL_NAME).get(_START) if self._is_ours() else None

    def is_committed(self) -> bool:
        """Whether the output is this run's result, and only the staging directory is still to be removed."""
        if not self._is_ours() or not self.output.is_dir() or (self.staging / CHECKPOINT_NAME).exists():
            return False
        return _COMMIT in read_journal(self.staging / JOURNAL_NAME)

    def __enter__(self) -> RunDirectory:
        self._ranks.broadcast(self._enter)
        if not self._ranks.is_first:
            self._join()
        return self

    def _join(self) -> None:
        """Join the run on a rank that does not hold the directory."""
        if not (self.staging / JOURNAL_NAME).is_file():
            raise InputError(
                f"rank {self._ranks.rank} does not see the directory that rank 0 works in",
                where=str(self.staging),
                do="put -o on a file system that all ranks share",
            )
        self.journal = Journal(self.staging, self._notify, self._ranks)

    def _enter(self) -> None:
        self.check()
        self._new_parents = [p for p in self.output.parents if not p.exists()]
        make_folder(self.staging, "the output")
        with contextlib.ExitStack() as stack:
            self._lock = stack.enter_context((self.staging / JOURNAL_NAME).open("a"))
            self._take_lock()
            self.journal = Journal(self.staging, self._notify, self._ranks)
            stack.callback(self.journal.close)
            if self.start is None:
                self._clear()
            remove_temporaries(self.staging)
            # The lock is given up last.
            self._open = stack.pop_all()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The other process may have finished, and removed what was opened here.
            held = os.path.samestat(os.fstat(self._lock.fileno()), (self.staging / JOURNAL_NAME).stat())
        except OSError:
            held = False
        if not held:
            raise InputError(
                "another process is writing this output", where=str(self.output), do="wait for it, or choose another -o"
            ) from None

    def _clear(self) -> None:
        left = [path for path in self.staging.iterdir() if path.name != JOURNAL_NAME]
        if left:
            self._notify(f"{self.staging}: the start of the run is not in the journal; all of it is done again")
        self.journal.clear()
        for path in left:
            _remove(path)

    @property
    def start(self) -> Mapping[str, Any] | None:
        """The first step of the run that was cut here; None: nothing is done yet."""
        return self.journal.line(_START)

    @property
    def checkpoint(self) -> Path:
        """The directory that becomes the output."""
        return self.staging / CHECKPOINT_NAME

    @property
    def shards(self) -> Path:
        """The directory of the shards that the checkpoint's weight files are made of."""
        return self.staging / SHARDS_NAME

    def used_bytes(self) -> int:
        """Return the bytes of disk that the files in the staging directory take."""
        return sum(path.stat().st_blocks * 512 for path in self.staging.rglob("*") if path.is_file())

    def begin(self, **values: Any) -> None:
        """Record the run's first step: from here on an interruption keeps what is done."""
        self.journal.record(_START, **values)
        self._accepted = True
        self._make_folders()

    def go_on(self) -> None:
        """Accept the interrupted run here as the one that is asked for, and continue it."""
        self._accepted = True
        if not self.is_committed():
            self._make_folders()

    def _make_folders(self) -> None:
        self.checkpoint.mkdir(exist_ok=True)
        self.shards.mkdir(exist_ok=True)

    def commit(self) -> None:
        """Make the checkpoint inside staging the output, and drop the rest. Raises InputError if the output exists."""
        if os.path.lexists(self.output):
            self._keep = True
            raise InputError(
                "the output appeared while the run was working",
                where=str(self.output),
                do=f"move it away; {self._how_to_go_on} then",
            )
        self.journal.record(_COMMIT)
        self.checkpoint.rename(self.output)
        sync_directory(self.output.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the staging directory, the journal last: while it is there the rest is known to be a run's."""
        for path in self.staging.iterdir():
            if path.name != JOURNAL_NAME:
                _remove(path)
        (self.staging / JOURNAL_NAME).unlink()
        self.staging.rmdir()

    def reject(self, why: Mapping[str, str]) -> Path:
        """Keep the checkpoint, which turned out wrong, beside the output and marked; one rejected before makes room.

        Nothing is left to go on with.
        """
        write_json(self.checkpoint / REJECTED_NAME, dict(why))
        if self.rejected.exists():
            shutil.rmtree(self.rejected)
        self.checkpoint.rename(self.rejected)
        sync_directory(self.output.parent)
        self.journal.clear()
        return self.rejected

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ranks.is_first:
            return
        try:
            if error is not None and self.staging.exists():
                self._stopped(error)
        finally:
            self._open.close()

    def _stopped(self, error: BaseException) -> None:
        """Keep what another process can go on with, remove what none can. Raises DiskFullError for a full disk."""
        full = is_disk_full(error)
        if self.start is not None and not self._accepted:
            # Another run's state, which this one was refused.
            return
        kept = self.start is not None and (self._keep or not _comes_again(error))
        if not kept:
            shutil.rmtree(self.staging, ignore_errors=True)
            with contextlib.suppress(OSError):
                for parent in self._new_parents:
                    parent.rmdir()
        if full:
            raise DiskFullError(
                "the disk is full",
                where=str(self.staging.parent),
                got=str(error),
                do=f"free some; {self._how_to_go_on} then" if kept else "free some",
            ) from error
        if kept and isinstance(error, Exception):
            error.add_note(f"What is done is kept: {self._how_to_go_on}.")


def _comes_again(error: BaseException) -> bool:
    """Whether the same run would end the same way. A source that cannot be read may be readable later."""
    return isinstance(error, StructPruneError) and not isinstance(error, CheckpointError | RankError)


def _begins_a_run(journal: Path) -> bool:
    with journal.open("rb") as handle:
        return handle.read(max(map(len, _FIRST_LINES))).startswith(_FIRST_LINES)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _is_rejected(directory: Path) -> bool:
    """Whether it is a checkpoint that a run rejected: the mark in it says why."""
    mark = directory / REJECTED_NAME
    if directory.is_symlink() or not mark.is_file():
        return False
    try:
        return {"got", "wanted"} <= read_json(mark).keys()
    except CheckpointError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


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
