"""Weights of a checkpoint of which some tensors have fewer rows, picked as they are read.

`FewerRows` answers as an open safetensors file does, as a merged adapter does (merged_weights.py).
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.weight_source import STORED_DTYPES, dtype_code
from structprune.memory import release_free_memory

_PIECE_BYTES = 4 * 2**20


class FewerRows:
    """A checkpoint whose tensors `sliced` have the rows `rows` alone, ascending.

    These are read from `instead`, if it is named, which has the kept rows alone already, in the base's dtypes.
    """

    def __init__(
        self,
        base: CheckpointReader,
        sliced: Collection[str],
        rows: Sequence[int],
        instead: CheckpointReader | None = None,
    ) -> None:
        self._base, self._sliced, self._rows, self._instead = base, frozenset(sliced), tuple(rows), instead

    def __iter__(self) -> Iterator[str]:
        return iter(self._base.shapes)

    def keys(self) -> list[str]:
        """Return the tensors' names."""
        return list(self._base.shapes)

    def __enter__(self) -> FewerRows:
        return self

    def __exit__(self, *_: object) -> None:
        # No file is open between two readings.
        return

    def in_width(self, dtype: torch.dtype) -> FewerRows:
        """Return the same weights; those that are computed as they are read are computed in `dtype`."""
        view = copy.copy(self)
        view._base = self._base if self._base.weights is None else self._base.in_width(dtype)
        return view

    def get_slice(self, name: str) -> Any:
        """Return the tensor `name`, of which rows can be read."""
        if name not in self._sliced:
            return self._base.open_slice(name)
        if self._instead is not None:
            return _InsteadRows(self._instead.open_slice(name), _PickedRows(self._base, name, self._rows))
        return _PickedRows(self._base, name, self._rows)

    @property
    def base(self) -> CheckpointReader:
        """The checkpoint with all rows."""
        return self._base

    def others(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (numbers of rows in the base, those rows) of what is left out of the tensor `name`, by pieces."""
        num_rows, *width = self._base.shapes[name]
        dtype = self._base.dtypes[name]
        step = max(1, _PIECE_BYTES // max(1, math.prod(width) * dtype.itemsize))
        kept = torch.zeros(num_rows, dtype=torch.bool)
        kept[list(self._rows)] = True
        for start in range(0, num_rows, step):
            numbers = torch.nonzero(~kept[start : start + step]).flatten()
            if len(numbers):
                # Opened anew: pages of a file's mapping stay resident as long as it is open.
                piece: Tensor = self._base.open_slice(name)[start : min(start + step, num_rows)]
                yield numbers + start, piece[numbers]

    def path_of(self, name: str) -> Path:
        """Return the file that holds the tensor."""
        return self._base.path_of(name)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of weights."""
        return tuple(self._base.files)

    @property
    def content_files(self) -> tuple[Path, ...]:
        """Further files that decide what the weights are."""
        return () if self._base.weights is None else self._base.weights.content_files

    @property
    def content(self) -> str:
        """What tells two lists of rows of one length apart."""
        digest = hashlib.sha256(",".join(map(str, self._rows)).encode())
        if self._base.weights is not None:
            digest.update(self._base.weights.content.encode())
        return digest.hexdigest()

    @property
    def scratch_bytes(self) -> int:
        """What reading holds beside the tensor that is read: a piece of the base's, and the rows picked of it."""
        return self._base.scratch_bytes + 2 * _PIECE_BYTES


class _InsteadRows:
    """Rows of another checkpoint, whose header is that of the picked ones."""

    def __init__(self, rows: Any, picked: _PickedRows) -> None:
        self._rows, self.get_shape, self.get_dtype = rows, picked.get_shape, picked.get_dtype

    def __getitem__(self, part: Any) -> Tensor:
        found: Tensor = self._rows[part]
        return found.to(STORED_DTYPES[self.get_dtype()])


class _PickedRows:
    """One tensor, as safetensors' own slices are used: `[...]` for all of it, `[first:last]` for some rows."""

    def __init__(self, base: CheckpointReader, name: str, rows: Sequence[int]) -> None:
        self._base, self._name, self._rows = base, name, rows

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return [len(self._rows), *self._base.shapes[self._name][1:]]

    def get_dtype(self) -> str:
        """Return the width, by safetensors' name: the base's."""
        return dtype_code(self._base.dtypes[self._name])

    def __getitem__(self, part: Any) -> Tensor:
        first, last, _ = part.indices(len(self._rows)) if isinstance(part, slice) else (0, len(self._rows), 1)
        wanted = self._rows[first:last]
        dtype = self._base.dtypes[self._name]
        result = torch.empty((len(wanted), *self.get_shape()[1:]), dtype=dtype)
        if not wanted:
            return result
        # Rows lie close to one another: pieces of the file are read from end to end.
        row_bytes = max(1, result[0].numel() * dtype.itemsize)
        step = max(1, _PIECE_BYTES // row_bytes)
        bounds = [*range(wanted[0], wanted[-1] + 1, step), wanted[-1] + 1]
        for start, stop in itertools.pairwise(bounds):
            low, high = bisect.bisect_left(wanted, start), bisect.bisect_left(wanted, stop)
            if low < high:
                # Opened anew: pages of a file's mapping stay resident as long as it is open.
                piece: Tensor = self._base.open_slice(self._name)[start:stop]
                result[low:high] = piece[torch.tensor(wanted[low:high]) - start]
                del piece
        # What pieces were made of is smaller than what goes back to the system by itself.
        release_free_memory()
        return result
