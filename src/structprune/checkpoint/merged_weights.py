"""Weights of a checkpoint with a low-rank adapter merged into them: W + s B A, a few rows at a time as they are read.

`MergedWeights` answers as an open safetensors file does, as a GGUF file does (gguf_weights.py).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.weight_source import STORED_DTYPES, dtype_code
from structprune.errors import CheckpointError, NumericalError
from structprune.files import check_regular

_CHUNK_NUMBERS = 2**20
# Of each number of a piece, float32: the weight, the update, their sum.
_PIECE_BYTES = 3 * 4
_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankUpdate:
    """What is added to one tensor: `scale` times B A, names of tensors in the adapter's file."""

    down: str
    """A: (rank, inputs)."""
    up: str
    """B: (outputs, rank)."""
    scale: float
    transposed: bool
    """Whether the tensor is (inputs, outputs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedEntry:
    """How one tensor of the merged checkpoint is made: of the base's, or of one that the adapter has in its place."""

    base: str | None = None
    """The name in the base's files."""
    saved: str | None = None
    """The name in the adapter's file."""
    update: LowRankUpdate | None = None


class AdapterFile:
    """The tensors of `adapter_model.safetensors`, read by name. Raises CheckpointError for a file that is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as handle:
            names = list(handle.keys())
            self.shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
            self.codes: dict[str, str] = {name: handle.get_slice(name).get_dtype() for name in names}

    def read(self, name: str) -> Tensor:
        """Read a tensor as float32. Raises NumericalError for a value that is not finite."""
        with self._open() as handle:
            tensor: Tensor = handle.get_tensor(name).float()
        if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
            raise NumericalError(
                f"tensor {name!r} of the adapter holds NaN or infinity",
                where=str(self.path),
                do="the adapter is damaged, or its training failed",
            )
        return tensor

    @cached_property
    def content(self) -> str:
        """SHA-256 of the file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def _open(self) -> Any:
        check_regular(self.path, CheckpointError)
        try:
            return safe_open(str(self.path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "the adapter's weights are truncated or not safetensors", where=str(self.path), got=str(error)
            ) from None


class MergedWeights:
    """A checkpoint and an adapter as one open file. `dtype` is the width of what is read; None: the base's."""

    def __init__(
        self,
        base: CheckpointReader,
        adapter: AdapterFile,
        entries: Mapping[str, MergedEntry],
        settings: Path,
    ) -> None:
        self.base = base
        self.adapter = adapter
        self.dtype: torch.dtype | None = None
        # What is dequantised is not rounded before something is added to it.
        self._wide = base if base.weights is None else base.in_width(torch.float32)
        self._entries = entries
        self._settings = settings
        self.content = hashlib.sha256(adapter.content.encode() + settings.read_bytes()).hexdigest()
        """What tells two adapters of the same shapes apart, whose settings may differ too."""

    def keys(self) -> list[str]:
        """Return the tensors' names in the merged checkpoint."""
        return list(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __enter__(self) -> MergedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        # No file is open between two readings.
        return

    def in_width(self, dtype: torch.dtype) -> MergedWeights:
        """Return the same weights, read in `dtype`: sums are rounded once."""
        view = copy.copy(self)
        view.dtype = dtype
        view.base = self.base.in_width(dtype) if self.base.weights is not None else self.base
        return view

    def get_slice(self, name: str) -> MergedSlice:
        """Return the tensor `name`, of which rows can be read."""
        return MergedSlice(self, name, self._entries[name])

    def wide_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of the base's tensor as a float32 copy."""
        rows: Tensor = self._wide.open_slice(name)[start:stop]
        return rows.to(torch.float32, copy=True)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of weights, the adapter's last."""
        return (*self.base.files, self.adapter.path)

    @property
    def content_files(self) -> tuple[Path, ...]:
        """Further files that decide what the weights are."""
        return (self._settings,)

    def path_of(self, name: str) -> Path:
        """Return the file that holds the tensor, or what is added to."""
        base = self._entries[name].base
        return self.adapter.path if base is None else self.base.path_of(base)

    @property
    def scratch_bytes(self) -> int:
        """What reading holds beside the tensor that is read, at most."""
        updates = [entry.update for entry in self._entries.values() if entry.update is not None]
        shapes = self.adapter.shapes
        factors = max((math.prod(shapes[one.down]) + math.prod(shapes[one.up]) for one in updates), default=0)
        saved = [math.prod(shapes[entry.saved]) for entry in self._entries.values() if entry.saved is not None]
        piece = max(_CHUNK_NUMBERS, *(shape[-1] for shape in self.base.shapes.values() if shape))
        # Factors are cast to float32 as they are read; what the adapter has in whole is read in whole.
        return self._wide.scratch_bytes + _PIECE_BYTES * piece + 2 * 4 * max([factors, *saved])


class MergedSlice:
    """One tensor, as safetensors' own slices are used: `[...]` for all of it, `[first:last]` for some rows."""

    def __init__(self, weights: MergedWeights, name: str, entry: MergedEntry) -> None:
        self._weights, self._name, self._entry = weights, name, entry

    def get_shape(self) -> list[int]:
        """Return the shape."""
        entry, weights = self._entry, self._weights
        if entry.saved is not None:
            return list(weights.adapter.shapes[entry.saved])
        assert entry.base is not None, "a tensor is the base's or the adapter's"
        return list(weights.base.shapes[entry.base])

    def get_dtype(self) -> str:
        """Return the width, by safetensors' name: the base's."""
        return dtype_code(self._dtype)

    def __getitem__(self, part: Any) -> Tensor:
        entry = self._entry
        if entry.update is None:
            return self._whole(part)
        size = self.get_shape()[0]
        first, last, _ = part.indices(size) if isinstance(part, slice) else (0, size, 1)
        return self._merged(entry.update, first, last)

    def _whole(self, part: Any) -> Tensor:
        """Read what nothing is added to."""
        entry, weights = self._entry, self._weights
        if entry.saved is not None:
            return weights.adapter.read(entry.saved)[part].to(self._dtype)
        assert entry.base is not None, "a tensor is the base's or the adapter's"
        return weights.base.open_slice(entry.base)[part]

    def _wide_rows(self, start: int, stop: int) -> Tensor:
        """Read rows of what something is added to, as a float32 copy."""
        entry, weights = self._entry, self._weights
        if entry.saved is not None:
            return weights.adapter.read(entry.saved)[start:stop].clone()
        assert entry.base is not None, "a tensor is the base's or the adapter's"
        return weights.wide_rows(entry.base, start, stop)

    @property
    def _dtype(self) -> torch.dtype:
        weights, entry = self._weights, self._entry
        if weights.dtype is not None:
            return weights.dtype
        if entry.base is not None:
            return weights.base.dtypes[entry.base]
        assert entry.saved is not None, "a tensor is the base's or the adapter's"
        return STORED_DTYPES[weights.adapter.codes[entry.saved]]

    def _merged(self, update: LowRankUpdate, first: int, last: int) -> Tensor:
        """Read rows `first` up to `last` with the update. Raises NumericalError for sums that the width cannot hold."""
        weights = self._weights
        columns = self.get_shape()[1]
        down_RI, up_OR = weights.adapter.read(update.down), weights.adapter.read(update.up)
        result = torch.empty((last - first, columns), dtype=self._dtype)
        step = max(1, _CHUNK_NUMBERS // columns)
        for start in range(first, last, step):
            stop = min(start + step, last)
            added = down_RI[:, start:stop].T @ up_OR.T if update.transposed else up_OR[start:stop] @ down_RI
            rows = self._wide_rows(start, stop).add_(added, alpha=update.scale)
            self._check(rows, result.dtype)
            result[start - first : stop - first] = rows
        return result

    def _check(self, rows: Tensor, dtype: torch.dtype) -> None:
        low, high = rows.aminmax()
        largest = max(-float(low), float(high))
        if math.isfinite(largest) and largest > torch.finfo(dtype).max:
            raise NumericalError(
                f"tensor {self._name!r} holds values that {str(dtype).removeprefix('torch.')} cannot, once the adapter "
                "is merged",
                where=str(self._weights.adapter.path),
                got=f"{largest:.6g}",
                do="ask for --output-dtype bfloat16 or float32",
            )
