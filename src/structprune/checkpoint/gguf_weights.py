"""Tensors of a GGUF file under a checkpoint's names, shapes and row orders: dequantised when they are asked for.

`GgufWeights` answers as an open safetensors file does (`keys`, `get_slice`), so the checkpoint reader has one way of
reading. A tensor is made in pieces of about _CHUNK_NUMBERS float32 numbers, each of which goes straight into a tensor
of the width that the checkpoint has; only a transposed tensor is in memory twice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from structprune.checkpoint.gguf_file import GgufHeader, GgufTensorInfo, dequantiser, read_rows
from structprune.errors import NumericalError

_CHUNK_NUMBERS = 2**20
# Of each number of a piece: its bytes, float32 in the dequantiser's groups, joined, in the checkpoint's order.
_PIECE_BYTES = 4 * 4
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

RowOrder = Literal["stored", "halves", "grouped", "tiled"]
"""halves: a head's rows are pairs in the file, and first half, second half in the checkpoint; grouped: queries of all
heads, then keys, then values in the file, and in the checkpoint the queries, key and value of one KV head after the
other; tiled: the first value head of every key head, then the second one of each, in the file, and those of one key
head after the other in the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufRows:
    """Rows of one tensor of the file; in a stacked tensor the rows of one expert follow those of another."""

    source: str
    first: int
    count: int
    order: RowOrder = "stored"
    heads: int = 1
    """Heads of the tensor; KV heads where it is grouped, key heads where it is tiled."""
    queries: int = 1
    """Queries of one KV head, where it is grouped; value heads of a key head, where it is tiled."""
    skipped: int = 0
    """Rows in front that are no part of a tiling."""

    def indices(self, first: int, last: int) -> np.ndarray[Any, Any]:
        """Return which rows of the file's tensor are rows `first` up to `last` of this piece."""
        wanted = np.arange(first, last)
        if self.order == "halves":
            size = self.count // self.heads
            head, row = np.divmod(wanted, size)
            half, pair = np.divmod(row, size // 2)
            wanted = head * size + 2 * pair + half
        elif self.order == "grouped":
            size = self.count // ((self.queries + 2) * self.heads)
            head, row = np.divmod(wanted, (self.queries + 2) * size)
            part, inner = np.divmod(row, size)
            # Queries of one KV head follow each other; its key and its value come behind those of the others.
            place = np.where(part < self.queries, head * self.queries + part, part * self.heads + head)
            wanted = place * size + inner
        elif self.order == "tiled":
            wanted = np.where(wanted < self.skipped, wanted, self.skipped + self._tiled(wanted - self.skipped))
        return self.first + wanted

    def _tiled(self, wanted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        size = (self.count - self.skipped) // (self.heads * self.queries)
        head, inner = np.divmod(wanted, size)
        key, value = np.divmod(head, self.queries)
        return (value * self.heads + key) * size + inner


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufEntry:
    """How one tensor of the checkpoint is made."""

    shape: tuple[int, ...]
    parts: tuple[GgufRows, ...]
    """Joined along the rows; none: zeros."""
    shift: float = 0.0
    """Added to every number."""
    transposed: bool = False
    """The parts are the tensor's columns."""
    row: bool = False
    """A vector that is one row of a matrix in the file."""
    alternating: bool = False
    """The rows of the parts come in turns."""
    columns: GgufRows | None = None
    """How the columns lie in the file, by the rule for rows; None: as they are."""
    logged: bool = False
    """Numbers below zero in the file, of which the checkpoint has the logarithms without their sign."""
    flat: bool = False
    """A vector that is a matrix in the file, row by row."""
    items: tuple[GgufEntry, ...] = ()
    """Entries that are stacked along a first dimension; it has no parts of its own then."""
    joined: bool = False
    """The items come one behind the other along the rows instead."""


class GgufWeights:
    """An open GGUF file. `dtype` is the width of every tensor that is read.

    Raises UnsupportedError for a type that cannot be dequantised, before any weight is read.
    """

    def __init__(self, header: GgufHeader, entries: Mapping[str, GgufEntry], dtype: torch.dtype) -> None:
        self.header = header
        self.dtype = dtype
        self._entries = entries
        by_kind = {info.kind: info for info in header.tensors.values()}
        self._dequantisers = {kind: dequantiser(info) for kind, info in by_kind.items()}

    def in_width(self, dtype: torch.dtype) -> GgufWeights:
        """Return the same file, read in `dtype`."""
        view = copy.copy(self)
        view.dtype = dtype
        return view

    def keys(self) -> list[str]:
        """Return the tensors' names in the checkpoint."""
        return list(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def get_slice(self, name: str) -> GgufSlice:
        """Return the tensor `name`, of which rows can be read."""
        return GgufSlice(self, name, self._entries[name])

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        return self.header.paths

    @property
    def content_files(self) -> tuple[Path, ...]:
        """None: all that there is to know is in the files of weights."""
        return ()

    @property
    def content(self) -> str:
        """Nothing: sizes tell two files apart as far as those of safetensors do."""
        return ""

    @property
    def scratch_bytes(self) -> int:
        """What reading holds beside the tensor that is read, at most."""
        piece = max(_CHUNK_NUMBERS, *(info.shape[-1] for info in self.header.tensors.values()))
        every = [entry.items[0] if entry.items and not entry.joined else entry for entry in self._entries.values()]
        whole = [math.prod(each.shape) for each in every if each.transposed or each.alternating or each.joined]
        return _PIECE_BYTES * piece + max(whole, default=0) * (4 + self.dtype.itemsize)

    def __enter__(self) -> GgufWeights:
        return self

    def __exit__(self, *_: object) -> None:
        # No file is open between two readings.
        return

    def path_of(self, name: str) -> Path:
        """Return the file that holds the tensor, or its first part."""
        entry = self._entries[name]
        parts = (entry.items[0] if entry.items else entry).parts
        return self.header.tensors[parts[0].source].path if parts else self.header.path

    def rows(self, info: GgufTensorInfo, indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Read these rows of the file's tensor, float32."""
        make = self._dequantisers[info.kind]
        low, high = int(indices.min()), int(indices.max()) + 1
        if high - low <= 2 * len(indices):
            rows = make(read_rows(info, low, high))
            return rows if len(rows) == len(indices) and _ascending(indices) else rows[indices - low]
        runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        return np.concatenate([make(read_rows(info, int(run[0]), int(run[-1]) + 1)) for run in runs])


def _ascending(indices: np.ndarray[Any, Any]) -> bool:
    return bool((np.diff(indices) == 1).all())


class GgufSlice:
    """One tensor, as safetensors' own slices are used: `[...]` for all of it, `[first:last]` for some rows."""

    def __init__(self, weights: GgufWeights, name: str, entry: GgufEntry) -> None:
        self._weights, self._name, self._entry = weights, name, entry

    def get_shape(self) -> list[int]:
        """Return the shape in the checkpoint."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Return the width that is read, by safetensors' name."""
        return _SAFETENSORS_NAMES[self._weights.dtype]

    def __getitem__(self, part: Any) -> Tensor:
        entry = self._entry
        if entry.joined:
            return torch.cat([GgufSlice(self._weights, self._name, item)[...] for item in entry.items])[part]
        if entry.items:
            return self._of_items(part)
        if entry.alternating:
            return self._in_turns()[part]
        if entry.transposed:
            return self._read(entry.shape[::-1], 0, entry.shape[1]).T[part]
        if not isinstance(part, slice):
            part = slice(None)
        if entry.row:
            return self._read((1, *entry.shape), 0, 1)[0][part]
        if entry.flat:
            rows = entry.parts[0].count
            return self._read((rows, entry.shape[0] // rows), 0, rows).reshape(-1)[part]
        first, last, _ = part.indices(entry.shape[0])
        return self._read((last - first, *entry.shape[1:]), first, last)

    def _of_items(self, part: Any) -> Tensor:
        """Read one item, some, or all of them, and of it what the rest of the index says."""
        first, *rest = part if isinstance(part, tuple) else (part,)
        items = self._entry.items[slice(None) if first is Ellipsis else first]
        if isinstance(items, GgufEntry):
            own = GgufSlice(self._weights, self._name, items)
            # A vector, or rows of a matrix, need not be read whole.
            return own[rest[0]] if len(rest) == 1 else own[...][tuple(rest)] if rest else own[...]
        stacked = torch.stack([GgufSlice(self._weights, self._name, item)[...] for item in items])
        return stacked[(slice(None), *rest)] if rest else stacked

    def _in_turns(self) -> Tensor:
        """Read the whole tensor, whose rows are those of its parts in turns."""
        entry = self._entry
        turned = entry.shape[::-1] if entry.transposed else entry.shape
        count = len(entry.parts)
        single = replace(entry, shape=(turned[0] // count, *turned[1:]), alternating=False, transposed=False)
        result = torch.empty(turned, dtype=self._weights.dtype)
        for place, rows in enumerate(entry.parts):
            result[place::count] = GgufSlice(self._weights, self._name, replace(single, parts=(rows,)))[...]
        return result.T if entry.transposed else result

    def _read(self, shape: tuple[int, ...], first: int, last: int) -> Tensor:
        """Read rows `first` up to `last` of the parts. Raises NumericalError for a number that float16 cannot hold."""
        weights, entry = self._weights, self._entry
        if not entry.parts:
            return torch.zeros(shape, dtype=weights.dtype)
        columns = shape[-1] if len(shape) > 1 else 1
        result = torch.empty((last - first, columns), dtype=weights.dtype)
        for rows, start, stop in self._pieces(first, last, columns):
            info = weights.header.tensors[rows.source]
            if len(shape) == 1:
                # A vector is one row in the file.
                values = weights.rows(info, np.zeros(1, np.int64)).reshape(-1)[rows.indices(start[0], start[1])]
            else:
                values = weights.rows(info, rows.indices(start[0], start[1]))
            piece = torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(-1, columns)
            if entry.columns is not None:
                piece = piece[:, torch.from_numpy(entry.columns.indices(0, columns))]
            piece = piece + entry.shift if entry.shift else piece
            piece = torch.log(-piece) if entry.logged else piece
            result[stop : stop + len(piece)] = piece
            if weights.dtype == torch.float16:
                self._check_float16(piece, result[stop : stop + len(piece)])
        return result.reshape(shape)

    def _pieces(self, first: int, last: int, columns: int) -> Iterator[tuple[GgufRows, tuple[int, int], int]]:
        """Yield (part, its rows, row of the result); no piece but a single row has more than _CHUNK_NUMBERS numbers."""
        step = max(1, _CHUNK_NUMBERS // columns)
        place = 0
        for rows in self._entry.parts:
            low, high = max(first, place), min(last, place + rows.count)
            for start in range(low, high, step):
                yield rows, (start - place, min(start + step, high) - place), start - first
            place += rows.count

    def _check_float16(self, wide: Tensor, narrow: Tensor) -> None:
        if torch.isfinite(wide).all() and not torch.isfinite(narrow).all():
            raise NumericalError(
                f"tensor {self._name!r} holds values that float16 cannot",
                where=str(self._weights.header.path),
                do="ask for --output-dtype bfloat16 or float32",
            )
