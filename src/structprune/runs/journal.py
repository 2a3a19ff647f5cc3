"""The journal of a run: one line per step that is done, with what it found and checksums of the files it left.

A line is a JSON object: `step` is its name, `files` path -> [bytes, CRC-32], `given` what the step depended on beside
the recipe, `seconds` the time spent so far, `check` the CRC-32 of the line itself; the rest are the step's values.
Lines are independent: a damaged one, or one whose files are damaged, costs its own step and no other.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from structprune.files import file_sum
from structprune.ranks import ALONE, Ranks

JOURNAL_NAME = "journal.jsonl"


def silent(text: str) -> None:
    """Tell nobody."""


class Journal:
    """Steps of one folder. A step that is recorded twice counts as it was the last time.

    `notify` gets one line for everything that is found damaged. Of several ranks the first reads and writes it; all
    find the same.
    """

    def __init__(self, folder: Path, notify: Callable[[str], None] = silent, ranks: Ranks = ALONE) -> None:
        self.folder = folder
        self._notify = notify
        self._ranks = ranks
        self._lines: dict[str, dict[str, Any]] = {}
        self.earlier_s = 0.0
        self._opened = time.perf_counter()
        self._handle: BinaryIO | None = None
        if ranks.is_first:
            self._open()

    def _open(self) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / JOURNAL_NAME
        self._lines = read_journal(path, self._notify)
        self.earlier_s = max((float(line["seconds"]) for line in self._lines.values()), default=0.0)
        self._opened = time.perf_counter()
        self._handle = path.open("ab")
        _cut_torn_end(path)

    @property
    def seconds(self) -> float:
        """Spent on the steps so far, in this process and in those before it."""
        return self.earlier_s + time.perf_counter() - self._opened

    def line(self, step: str) -> Mapping[str, Any] | None:
        """Return what was recorded of `step`, its files not looked at. On the first rank only."""
        return self._lines.get(step)

    def largest(self, name: str) -> int:
        """Return the largest recorded value of that name; 0 if there is none. On the first rank only."""
        return max((int(line[name]) for line in self._lines.values() if name in line), default=0)

    def find(self, step: str, given: Any = None) -> Mapping[str, Any] | None:
        """Return what was recorded of `step`, if it depended on the same `given` and its files are as they were."""
        return self._ranks.broadcast(lambda: self._find(step, given))

    def _find(self, step: str, given: Any) -> Mapping[str, Any] | None:
        line = self._lines.get(step)
        if line is None or line.get("given") != given:
            return None
        for name, recorded in line.get("files", {}).items():
            path = self.folder / name
            if not path.is_file():
                self._notify(f"{path} is missing; step {step!r} is done again")
                return None
            if file_sum(path) != recorded:
                self._notify(f"{path} is damaged; step {step!r} is done again")
                return None
        return line

    def record(self, step: str, files: Iterable[Path] = (), given: Any = None, **values: Any) -> Mapping[str, Any]:
        """Append the step and sync the line, which is returned. Each rank must have written its part of the files."""
        self._ranks.barrier()
        return self._ranks.broadcast(lambda: self._record(step, files, given, values))

    def _record(self, step: str, files: Iterable[Path], given: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
        line: dict[str, Any] = {"step": step, **values, "seconds": round(self.seconds, 6)}
        if given is not None:
            line["given"] = given
        sums = {os.path.relpath(path, self.folder): file_sum(path) for path in files}
        if sums:
            line["files"] = sums
        text = json.dumps(line)
        assert self._handle is not None
        self._handle.write(f"{json.dumps({**line, 'check': zlib.crc32(text.encode())})}\n".encode())
        self._handle.flush()
        os.fsync(self._handle.fileno())
        # As it will be read.
        self._lines[step] = json.loads(text)
        return self._lines[step]

    def clear(self) -> None:
        """Forget every step. On the first rank only."""
        assert self._handle is not None
        self._handle.truncate(0)
        self._lines.clear()
        self.earlier_s, self._opened = 0.0, time.perf_counter()

    def close(self) -> None:
        """Close the file; what was found stays."""
        if self._handle is not None:
            self._handle.close()


def read_journal(path: Path, notify: Callable[[str], None] = silent) -> dict[str, dict[str, Any]]:
    """Step -> its line, of those that are whole; empty if there is no journal."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    lines: dict[str, dict[str, Any]] = {}
    # A last line without an end was being written when the process was killed.
    whole, _, _ = content.rpartition(b"\n")
    for number, raw in enumerate(whole.split(b"\n") if whole else [], start=1):
        line = _checked(raw)
        if line is None:
            notify(f"{path}: line {number} is damaged; its step is done again")
        else:
            lines[line["step"]] = line
    return lines


def _checked(raw: bytes) -> dict[str, Any] | None:
    try:
        line: Any = json.loads(raw)
        check = line.pop("check")
        return line if zlib.crc32(json.dumps(line).encode()) == check and "step" in line else None
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _cut_torn_end(path: Path) -> None:
    content = path.read_bytes()
    whole, end, _ = content.rpartition(b"\n")
    if len(whole) + len(end) < len(content):
        os.truncate(path, len(whole) + len(end))
