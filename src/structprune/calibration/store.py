"""Hidden states of all calibration windows at the current block border, in memory or in a file.

Shape suffixes: N windows, S positions, D hidden size, B windows of one micro-batch.

The file variant uses plain reads and writes instead of a memory map: pages of a map count as this process's
resident memory, which is the very thing that the budget limits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


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
    """Hidden states in one file that is removed on close."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self.path = path
        self._window_bytes = shape[1] * shape[2] * dtype.itemsize
        self._file = path.open("w+b", buffering=0)
        self._file.truncate(self._window_bytes * shape[0])

    def read(self, start: int, stop: int) -> Tensor:
        buffer = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        view = _bytes_of(buffer)
        self._file.seek(start * self._window_bytes)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise EOFError(f"{self.path}: the hidden-state file is shorter than it was written")
            done += count
        return buffer

    def write(self, start: int, hidden_BSD: Tensor) -> None:
        view = _bytes_of(hidden_BSD.to(self.dtype).contiguous())
        self._file.seek(start * self._window_bytes)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:]) or 0

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's memory, without a copy. NumPy has no bfloat16, so the view is of bytes."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")
