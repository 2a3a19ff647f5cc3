"""The weight files of a checkpoint, put together from a run's shards without a tensor in memory.

A safetensors file is the length of its header in eight bytes, the header (JSON: name -> dtype, shape, byte range) and
the tensors' bytes one after the other. Files are therefore merged by a new header and copies of byte ranges.
Names, order, metadata and padding are those of transformers' `save_pretrained` and of the library below it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from structprune.checkpoint.weight_source import STORED_DTYPES, dtype_code, names_by_bytes
from structprune.errors import CheckpointError
from structprune.files import atomic_path, write_json

_CHUNK_BYTES = 16 * 2**20
_PATTERN = "model{suffix}.safetensors"
_METADATA = {"__metadata__": {"format": "pt"}}
# The library's order inside a file: by dtype, then by name. What is copied around a text model may have any.
_DTYPE_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """The place of one tensor in a safetensors file."""

    name: str
    dtype: str
    """Name of the dtype in the format, e.g. BF16."""
    shape: tuple[int, ...]
    path: Path
    start: int
    """First byte in the file."""
    num_bytes: int

    @classmethod
    def planned(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
        """Describe a tensor that lies in no file yet."""
        num_bytes = math.prod(shape) * dtype.itemsize
        return cls(name=name, dtype=dtype_code(dtype), shape=shape, path=Path(), start=0, num_bytes=num_bytes)

    @property
    def num_parameters(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    @property
    def order(self) -> tuple[int, str]:
        """Sort key inside a file."""
        known = self.dtype in _DTYPE_ORDER
        return _DTYPE_ORDER.index(self.dtype) if known else len(_DTYPE_ORDER), self.name


def stored_tensors(path: Path) -> list[StoredTensor]:
    """Read the header of the safetensors file `path`: its tensors in the order of their bytes."""
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header: Mapping[str, Any] = json.loads(handle.read(length))
    tensors = [
        StoredTensor(
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            path=path,
            start=8 + length + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    return sorted(tensors, key=lambda tensor: tensor.start)


def tensors_around(reader: CheckpointReader) -> list[StoredTensor]:
    """Return what the files hold beside the text model that `reader` shows; nothing where that is all of them."""
    if reader.wrapper is None:
        return []
    inside, whole = reader.wrapper.inside, reader.wrapper.whole
    return [
        tensor
        for path in whole.files
        for tensor in stored_tensors(path)
        # A tensor that lies in two files is that of one; what is only there for old versions has no place.
        if tensor.name not in inside and (tensor.name not in whole.shapes or whole.path_of(tensor.name) == path)
    ]


def copy_bytes(tensor: StoredTensor, target: BinaryIO) -> None:
    """Append the tensor's bytes to `target`, a chunk at a time."""
    left = tensor.num_bytes
    with tensor.path.open("rb", buffering=0) as source:
        source.seek(tensor.start)
        while left:
            chunk = source.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise CheckpointError("the shard is shorter than its header says", where=str(tensor.path))
            target.write(chunk)
            left -= len(chunk)


PutTensor = Callable[[StoredTensor, BinaryIO], None]
"""Appends the bytes of a tensor to an open file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One file that is to be written."""

    name: str
    tensors: tuple[StoredTensor, ...]
    """Content in the order of the bytes; each tensor names the shard it is copied from."""

    @property
    def header(self) -> bytes:
        """Length and header, padded so that the tensors begin at a multiple of eight bytes."""
        entries: dict[str, Any] = dict(_METADATA)
        end = 0
        for tensor in self.tensors:
            start, end = end, end + tensor.num_bytes
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Size of the file, its header included."""
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)

    def write(self, directory: Path, put: PutTensor | None = None) -> None:
        """Write the file into `directory`, whole and synced or not at all.

        `put` appends the bytes of a tensor; by default they are copied. Raises CheckpointError for a short shard.
        """
        with atomic_path(directory / self.name) as temporary, temporary.open("wb") as target:
            target.write(self.header)
            for tensor in self.tensors:
                (put or copy_bytes)(tensor, target)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """All weight files of one checkpoint, as a plan that can be measured and then written."""

    files: tuple[WeightFile, ...]

    @classmethod
    def of(cls, tensors: Iterable[StoredTensor], max_shard_bytes: int) -> WeightFiles:
        """Divide `tensors` as transformers does: one file where `max_shard_bytes` allow it, else numbered ones.

        A tensor that is larger than that has a file of its own. Headers do not count.
        """
        by_name = {tensor.name: tensor for tensor in tensors}
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda tensor: tensor.num_bytes,
            filename_pattern=_PATTERN,
            max_shard_size=max_shard_bytes,
        )
        return cls(
            files=tuple(
                WeightFile(
                    name=file, tensors=tuple(sorted((by_name[name] for name in names), key=lambda one: one.order))
                )
                for file, names in split.filename_to_tensors.items()
            )
        )

    @property
    def num_parameters(self) -> int:
        """Numbers in all files."""
        return sum(tensor.num_parameters for file in self.files for tensor in file.tensors)

    @property
    def dtype_names(self) -> list[str]:
        """Name the dtypes of the tensors as torch does, that of the most bytes first."""
        tensors = (tensor for file in self.files for tensor in file.tensors if tensor.dtype in STORED_DTYPES)
        return names_by_bytes((STORED_DTYPES[tensor.dtype], tensor.num_bytes) for tensor in tensors)

    @property
    def num_bytes(self) -> int:
        """Size of all files, without the index."""
        return sum(file.num_bytes for file in self.files)

    def write(
        self, directory: Path, written: Callable[[str], None] = lambda name: None, put: PutTensor | None = None
    ) -> None:
        """Write the files into `directory`, and the index last if there are several; `written` is told each name.

        `put` appends a tensor's bytes; by default they are copied, one chunk in memory at a time. Call it when every
        other file that a loader reads is there. Raises CheckpointError for a shard that is shorter than it was.
        """
        for file in self.files:
            file.write(directory, put)
            written(file.name)
        if len(self.files) > 1:
            write_json(directory / INDEX_NAME, self._index())

    def withdraw(self, directory: Path) -> None:
        """Rename what a loader looks for first, so that nothing loads `directory`."""
        first = directory / (INDEX_NAME if len(self.files) > 1 else SINGLE_NAME)
        first.rename(first.with_name(f"{first.name}.rejected"))

    def _index(self) -> dict[str, Any]:
        places = {tensor.name: file.name for file in self.files for tensor in file.tensors}
        total = sum(tensor.num_bytes for file in self.files for tensor in file.tensors)
        return {
            "metadata": {"total_parameters": self.num_parameters, "total_size": total},
            "weight_map": dict(sorted(places.items())),
        }
