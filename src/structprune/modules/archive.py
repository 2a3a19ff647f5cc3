"""Files of torch.export.save (.pt2), read as data: the graph as JSON and the tensors as plain bytes.

`torch.export.load` is not for files of others: it unpickles example inputs and some constants, evaluates expressions of
sizes, and takes any function of torch as an operation. Nothing of that is done here. What a file says of its sizes is
compared with what it holds before anything is made of it.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structprune.errors import CheckpointError, InputError, UnsupportedError, first_line
from structprune.files import check_regular

_FORMAT, _VERSION = "pt2", "0"
_JSON_BYTES = 256 * 2**20
"""A graph of a hundred thousand operations, each with the lines of the code that it comes from, has half of it."""
_DTYPES: Mapping[int, torch.dtype] = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""Numbers that torch's export schema (version 8) has for types of numbers."""
_PICKLES = ("aotinductor/", "weights/model.pt", "constants/model.pt", "constants/custom_obj", "constants/opaque_obj")
"""What lies below `data/` and is code, or would have to be unpickled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """An exported program as data."""

    graph: Mapping[str, Any]
    """`graph_module` of the file, as it stands in the JSON; nothing of it has been checked."""
    tensors: Mapping[str, Tensor]
    """Parameters, buffers and constants by name; names of one tensor have one tensor."""


def read_archive(path: Path) -> Archive:
    """Read a file of torch.export.save.

    Raises InputError for a file that is not there, CheckpointError for one that is damaged or says sizes that it does
    not have, UnsupportedError for parts that would have to be run or unpickled; the caller names the file.
    """
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as file:
            return _Reader(file, path.stat().st_size).read()
    except OSError as error:
        raise InputError("there is no such file", got=error.strerror) from error
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            "this is no program of torch.export.save that can be read",
            got=f"{type(error).__name__}: {first_line(error)}",
        ) from error


def type_of(number: int) -> torch.dtype:
    """Return a type of numbers by its number in the schema. Raises UnsupportedError for others."""
    if number not in _DTYPES:
        raise UnsupportedError("the program has numbers of a type that is not read here", got=f"type {number}")
    return _DTYPES[number]


def fixed_size(given: Any) -> int:
    """Read a size, `{"as_int": 3}`. Raises UnsupportedError for an expression: those are code."""
    size = given.get("as_int") if isinstance(given, dict) else given
    if not isinstance(size, int) or isinstance(size, bool):
        raise UnsupportedError(
            "the program has sizes that are not fixed",
            got=str(given)[:200],
            wanted="a number",
            do="export it without dynamic shapes",
        )
    return size


class _Reader:
    def __init__(self, file: zipfile.ZipFile, size: int) -> None:
        self._file = file
        members = file.infolist()
        self._root = members[0].filename.partition("/")[0] if members else ""
        self._sizes = {member.filename.removeprefix(f"{self._root}/"): member.file_size for member in members}
        # Members that are packed, or that lie in each other, may be larger than the file.
        if any(each.compress_type for each in members) or sum(each.file_size for each in members) > size:
            raise CheckpointError("the file says that it holds more than its size")
        self._made: dict[str, Tensor] = {}
        self._views: dict[tuple[Any, ...], Tensor] = {}

    def read(self) -> Archive:
        kind, version = (self._bytes(f"archive_{name}").decode() for name in ("format", "version"))
        if (kind, version) != (_FORMAT, _VERSION):
            raise UnsupportedError(
                "this version of a program is not read here",
                got=f"{kind} {version}",
                wanted=f"{_FORMAT} {_VERSION}",
            )
        for name in self._sizes:
            if name.startswith(tuple(f"data/{each}" for each in _PICKLES)):
                raise self._unsafe(name)
        tensors = {
            **self._tensors("constants", "data/constants/model_constants_config.json"),
            **self._tensors("weights", "data/weights/model_weights_config.json"),
        }
        return Archive(graph=self._json("models/model.json")["graph_module"], tensors=tensors)

    def _unsafe(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            "the program has a part that would have to be run or unpickled, which is never done here",
            got=what,
            wanted="a graph and plain tensors",
            do="export the module itself, without compiled parts and objects of its own",
        )

    def _bytes(self, name: str) -> bytes:
        if name not in self._sizes:
            raise CheckpointError("the program lacks a part", wanted=name)
        return self._file.read(f"{self._root}/{name}")

    def _json(self, name: str) -> Any:
        if self._sizes.get(name, 0) > _JSON_BYTES:
            raise CheckpointError("a description is too large", got=name)
        return json.loads(self._bytes(name))

    def _tensors(self, folder: str, described: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, entry in self._json(described)["config"].items():
            if entry["use_pickle"] or entry["tensor_meta"] is None:
                raise self._unsafe(f"{folder} {name}")
            found[name] = self._tensor(name, f"data/{folder}/{entry['path_name']}", entry["tensor_meta"])
        return found

    def _tensor(self, name: str, place: str, meta: Mapping[str, Any]) -> Tensor:
        """Return a view of the bytes at `place`, the same one for the same view."""
        dtype = type_of(meta["dtype"])
        sizes, strides = (tuple(fixed_size(each) for each in meta[key]) for key in ("sizes", "strides"))
        offset = fixed_size(meta["storage_offset"])
        count, left = divmod(self._sizes.get(place, 0), dtype.itemsize)
        empty = 0 in sizes
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if left or min((offset, *sizes, *strides)) < 0 or (not empty and last >= count):
            raise CheckpointError(
                f"tensor {name!r} has other sizes than its data",
                got=f"{self._sizes.get(place, 0)} bytes",
                wanted=f"{'x'.join(map(str, sizes))} of {dtype.itemsize} bytes, from number {offset}",
            )
        if empty:
            return torch.empty(sizes, dtype=dtype)
        if math.prod(sizes) > count:
            # An axis of stride 0 is as long as a file says.
            raise CheckpointError(f"tensor {name!r} repeats its data", got=str(sizes))
        key = (place, dtype, sizes, strides, offset)
        if key not in self._views:
            if place not in self._made:
                self._made[place] = torch.frombuffer(bytearray(self._bytes(place)), dtype=torch.uint8)
            flat = self._made[place].view(dtype)
            self._views[key] = flat.as_strided(sizes, strides, offset)
        return self._views[key]
