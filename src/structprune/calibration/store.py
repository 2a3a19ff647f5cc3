"""Hidden states of all calibration windows at the current block boundary, in memory or in a file.

Shape suffixes: N windows, S positions, D hidden size, B windows of one micro-batch.

The file variant uses plain reads and writes instead of a memory map: pages of a map count as this process's
resident memory, which is the very thing that the budget limits.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from structprune.ranks import ALONE, Ranks


class HiddenStore(Protocol):
    """(N, S, D) hidden states, read and overwritten in micro-batches."""

    shape: tuple[int, int, int]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor: ...

    def write(self, start: int, hidden_BSD: Tensor) -> None: ...

    def close(self) -> None: ...


class MemoryStore:
    """Hidden states in host memory."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._hidden_NSD = torch.empty(shape, dtype=dtype)

    def read(self, start: int, stop: int) -> Tensor:
        return self._hidden_NSD[start:stop]

    def write(self, start: int, hidden_BSD: Tensor) -> None:
        self._hidden_NSD[start : start + len(hidden_BSD)] = hidden_BSD

    def close(self) -> None:
        self._hidden_NSD = torch.empty(0)


class FileStore:
    """Hidden states in one file that is removed on close; with `lasting` it stays, and is taken up again.

    A lasting file is one for all ranks, each window at its place in the run: `ranks` is whose windows this store has.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        lasting: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.path = path
        self._lasting = lasting
        self._ranks = ranks if lasting else ALONE
        self._window_bytes = shape[1] * shape[2] * dtype.itemsize
        # Not emptied where another rank may have written by now.
        flags = os.O_RDWR | os.O_CREAT | (0 if lasting else os.O_TRUNC)
        self._file = FileIO(path, "r+", opener=lambda name, _: os.open(name, flags, 0o666))
        if self._ranks.size == 1:
            self._file.truncate(self._window_bytes * shape[0])

    def read(self, start: int, stop: int) -> Tensor:
        buffer = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        for place, view in self._places(start, buffer):
            self._file.seek(place)
            _read_into(self._file, view)
        return buffer

    def write(self, start: int, hidden_BSD: Tensor) -> None:
        for place, view in self._places(start, hidden_BSD.to(self.dtype).contiguous()):
            self._file.seek(place)
            _write_all(self._file, view)

    def flush(self) -> None:
        """Let other machines see what was written."""
        if self._ranks.size > 1:
            os.fsync(self._file.fileno())

    def _places(self, start: int, hidden_BSD: Tensor) -> Iterator[tuple[int, memoryview]]:
        """Yield (place in the file, memory) of each stretch of `hidden_BSD` that lies in one piece there."""
        if self._ranks.size == 1:
            yield start * self._window_bytes, _bytes_of(hidden_BSD)
            return
        for number, hidden_SD in enumerate(hidden_BSD, start):
            yield _number(self._ranks, number) * self._window_bytes, _bytes_of(hidden_SD)

    def close(self) -> None:
        self._file.close()
        if not self._lasting:
            self.path.unlink(missing_ok=True)


def dump(store: HiddenStore, path: Path, ranks: Ranks = ALONE) -> list[int]:
    """Copy the store's windows to a file that is there, each to its place in the run, one at a time.

    Returns [bytes, CRC-32] of what was written.
    """
    size, crc = 0, 0
    with path.open("r+b", buffering=0) as file:
        for window in range(store.shape[0]):
            view = _bytes_of(store.read(window, window + 1).contiguous())
            file.seek(_number(ranks, window) * len(view))
            _write_all(file, view)
            crc = zlib.crc32(view, crc)
            size += len(view)
        if ranks.size > 1:
            # Other machines are to see it.
            os.fsync(file.fileno())
    return [size, crc]


def fill(store: HiddenStore, path: Path, ranks: Ranks = ALONE) -> None:
    """Read the store's windows from a file that `dump` wrote, on whatever number of ranks."""
    with path.open("rb", buffering=0) as file:
        for window in range(store.shape[0]):
            buffer = torch.empty((1, *store.shape[1:]), dtype=store.dtype)
            view = _bytes_of(buffer)
            file.seek(_number(ranks, window) * len(view))
            _read_into(file, view)
            store.write(window, buffer)


def _number(ranks: Ranks, window: int) -> int:
    """Return the run's number of a rank's own window."""
    return ranks.rank + window * ranks.size


def num_bytes(store: HiddenStore) -> int:
    """Return the bytes of all windows of a store."""
    return torch.Size(store.shape).numel() * store.dtype.itemsize


def _read_into(file: FileIO, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise EOFError(f"{file.name}: the hidden-state file is shorter than it was written")
        done += count


def _write_all(file: FileIO, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done:]) or 0


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the tensor's memory, without a copy. NumPy has no bfloat16, so the view is of bytes."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")
