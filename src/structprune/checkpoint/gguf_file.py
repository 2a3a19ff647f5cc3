"""The container of a GGUF file: its metadata and where its tensors lie, read under bounds.

The format is GGUF as ggml defines it, versions 2 and 3, little-endian. Nothing that the file says of its own sizes
is believed before it was compared with the bytes that are there: counts, lengths, dimensions, offsets. So a header
costs memory in proportion to the file, at most _MOST_HEADER_BYTES of it, and reading it always ends.
"""

from __future__ import annotations

import math
import re
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from structprune.errors import CheckpointError, UnsupportedError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# The largest vocabularies (a quarter of a million tokens and their merges) take about 20 MiB.
_MOST_HEADER_BYTES = 256 * 2**20
# What the format allows for a key; Python objects cost more than the bytes of short items, so there is a bound on them.
_MOST_KEY_BYTES = 2**16 - 1
_MOST_ITEMS = 2**22
_MOST_NESTING = 4
_MOST_DIMS = 4
_DEFAULT_ALIGNMENT = 32
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

# Value type -> numpy's name for it; strings and arrays are read on their own.
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
# Least bytes of one item of an array.
_LEAST_BYTES = {**{kind: np.dtype(name).itemsize for kind, name in _NUMBERS.items()}, _STRING: 8, _ARRAY: 12}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensorInfo:
    """One tensor of the file: rows of blocks, each block some numbers at some bits."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as in a checkpoint (the file has them the other way round)."""
    kind: int
    """ggml's number of the type."""
    kind_name: str
    path: Path
    offset: int
    """Bytes from the start of the file."""
    row_bytes: int
    """Bytes of one row of the last dimension."""

    @property
    def num_rows(self) -> int:
        """All dimensions but the last."""
        return math.prod(self.shape[:-1])

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.num_rows * self.row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What one file, or all files of a split one, say before the weights."""

    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    """Key -> number, text, list of texts, numpy array or list of arrays."""
    tensors: Mapping[str, GgufTensorInfo]

    @property
    def path(self) -> Path:
        """The first file, which messages name."""
        return self.paths[0]


def gguf_package() -> Any:
    """Return the `gguf` package, for its table of types and its dequantisation. Raises UnsupportedError without it."""
    try:
        import gguf
    except ImportError:
        raise UnsupportedError("GGUF files need the gguf package", do="pip install 'structprune[gguf]'") from None
    return gguf


def read_gguf(path: Path) -> GgufHeader:
    """Read the header of the file `path`, and of the other parts where it is one of a split file.

    Raises CheckpointError for a file that is damaged, says sizes that it does not have, or misses its other parts.
    """
    named = _SPLIT.fullmatch(path.name)
    if named is None:
        header = _read_one(path)
        _check_lone(header)
        return header
    count = int(named["count"])
    if not 1 <= count <= 10_000 or not 1 <= int(named["number"]) <= count:
        raise CheckpointError("the name says a part that cannot be", where=str(path), got=path.name)
    paths = [path.with_name(f"{named['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [other.name for other in paths if not other.exists()]
    if missing:
        raise CheckpointError(
            f"the file is part {int(named['number'])} of {count} of a split GGUF file, whose other parts are missing",
            where=str(path),
            got=f"no {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}",
            wanted=f"all {count} parts in one directory",
            do="put the missing parts beside it, or join them with llama.cpp's llama-gguf-split --merge",
        )
    return _joined([_read_one(other) for other in paths])


def _check_lone(header: GgufHeader) -> None:
    count = header.metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        number = header.metadata.get("split.no", 0)
        raise CheckpointError(
            f"the file is part {int(number) + 1} of {count} of a split GGUF file, and its name does not say so",
            where=str(header.path),
            wanted=f"a name that ends in -{int(number) + 1:05d}-of-{count:05d}.gguf, and the other parts beside it",
            do="give the parts the names that they had, or join them with llama.cpp's llama-gguf-split --merge",
        )


def _joined(parts: list[GgufHeader]) -> GgufHeader:
    """Join the headers of all parts. Raises CheckpointError if they are not parts of one file."""
    tensors: dict[str, GgufTensorInfo] = {}
    for number, part in enumerate(parts):
        told = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if told != (number, len(parts)):
            raise CheckpointError(
                "the part says another place in the split file than its name",
                where=str(part.path),
                got=f"split.no {told[0]}, split.count {told[1]}",
                wanted=f"split.no {number}, split.count {len(parts)}",
            )
        for name, info in part.tensors.items():
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} is in two parts of the split file", where=str(part.path))
            tensors[name] = info
    total = parts[0].metadata.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise CheckpointError(
            "the parts hold another number of tensors than the split file says",
            where=str(parts[0].path),
            got=len(tensors),
            wanted=total,
        )
    paths = tuple(path for part in parts for path in part.paths)
    return GgufHeader(paths=paths, metadata=parts[0].metadata, tensors=tensors)


def _read_one(path: Path) -> GgufHeader:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("not a regular file", where=str(path), wanted="a .gguf file on a disk")
        with path.open("rb") as handle:
            return _Parser(path, handle, status.st_size).header()
    except FileNotFoundError:
        raise CheckpointError("the GGUF file does not exist", where=str(path)) from None
    except OSError as error:
        raise CheckpointError("the GGUF file cannot be read", where=str(path), got=str(error)) from None


class _Parser:
    """One pass over the header of one file."""

    def __init__(self, path: Path, handle: BinaryIO, size: int) -> None:
        self._path, self._handle, self._size = path, handle, size
        self._end = min(size, _MOST_HEADER_BYTES)
        self._place = 0
        self._items = 0

    def header(self) -> GgufHeader:
        if self._size < 24 or self._take(4, "magic") != _MAGIC:
            raise self._damaged("it does not begin as one")
        version, num_tensors, num_keys = self._unpack("<IQQ", "counts")
        if version not in _VERSIONS:
            swapped = version in [number << 24 for number in _VERSIONS]
            if not swapped and not 1 <= version < 100:
                raise self._damaged("no version has this number", got=version)
            raise UnsupportedError(
                "this kind of GGUF file cannot be read",
                where=str(self._path),
                got="a big-endian file" if swapped else f"version {version}",
                wanted="version 2 or 3, little-endian",
            )
        self._check_count(num_keys, 8 + 4 + 1, "metadata entries")
        self._check_count(num_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text("a metadata key", _MOST_KEY_BYTES)
            if key in metadata:
                raise self._damaged(f"the metadata key {key!r} is there twice")
            metadata[key] = self._value(self._unpack("<I", key)[0], key, 0)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
            raise self._damaged("general.alignment is no power of two", got=alignment)
        raw = [self._tensor() for _ in range(num_tensors)]
        start = -(-self._place // alignment) * alignment
        return GgufHeader(paths=(self._path,), metadata=metadata, tensors=self._placed(raw, start, alignment))

    def _damaged(self, what: str, **details: Any) -> CheckpointError:
        return CheckpointError(
            f"the file is truncated or not GGUF: {what}",
            where=str(self._path),
            do="download this file again",
            **details,
        )

    def _take(self, count: int, what: str) -> bytes:
        if count > self._end - self._place:
            where = "the file" if self._end == self._size else f"a header of {_MOST_HEADER_BYTES // 2**20} MiB"
            raise self._damaged(
                f"the GGUF header goes beyond the end of {where}",
                got=f"{count} bytes for {what} at byte {self._place}",
                wanted=f"at most {self._end - self._place}",
            )
        data = self._handle.read(count)
        if len(data) != count:
            raise self._damaged("the file ended while it was read")
        self._place += count
        return data

    def _unpack(self, form: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._take(struct.calcsize(form), what))

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        room = (self._end - self._place) // least_bytes
        if count > room:
            raise self._damaged(
                f"the GGUF header says more {what} than the file has room for", got=count, wanted=f"at most {room}"
            )
        self._items += count
        if self._items > _MOST_ITEMS:
            raise self._damaged(f"the GGUF header says too many {what}", got=count, wanted=f"at most {_MOST_ITEMS}")

    def _text(self, what: str, most_bytes: int | None = None) -> str:
        (length,) = self._unpack("<Q", what)
        if most_bytes is not None and length > most_bytes:
            raise self._damaged(f"{what} is too long", got=f"{length} bytes", wanted=f"at most {most_bytes}")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8", got=str(error)) from None

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind in _NUMBERS:
            return np.frombuffer(self._take(_LEAST_BYTES[kind], key), _NUMBERS[kind])[0].item()
        if kind == _STRING:
            return self._text(key)
        if kind != _ARRAY or depth == _MOST_NESTING:
            raise self._damaged(f"the metadata key {key!r} has a type that the format does not know", got=kind)
        item_kind, count = self._unpack("<IQ", key)
        if item_kind not in _LEAST_BYTES:
            raise self._damaged(f"the items of {key!r} have a type that the format does not know", got=item_kind)
        if item_kind in _NUMBERS:
            # As they lie there: a Python object for each would take many times the file's bytes.
            return np.frombuffer(self._take(count * _LEAST_BYTES[item_kind], key), _NUMBERS[item_kind])
        self._check_count(count, _LEAST_BYTES[item_kind], f"items of {key!r}")
        return [self._value(item_kind, key, depth + 1) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, dimensions innermost first, type, offset."""
        name = self._text("a tensor's name", _MOST_KEY_BYTES)
        (num_dims,) = self._unpack("<I", name)
        if not 1 <= num_dims <= _MOST_DIMS:
            raise self._damaged(f"tensor {name!r} has {num_dims} dimensions", wanted=f"1 to {_MOST_DIMS}")
        dims = self._unpack(f"<{num_dims}Q", name)
        kind, offset = self._unpack("<IQ", name)
        return name, dims, kind, offset

    def _placed(
        self, raw: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, GgufTensorInfo]:
        """Return the tensors with their places. Raises CheckpointError if they overlap or lie outside of the file."""
        sizes, names = _type_table()
        tensors: dict[str, GgufTensorInfo] = {}
        for name, dims, kind, offset in raw:
            if name in tensors:
                raise self._damaged(f"tensor {name!r} is there twice")
            if kind not in sizes:
                raise self._damaged(f"tensor {name!r} has a type that the gguf package does not know", got=kind)
            block, block_bytes = sizes[kind]
            if min(dims) < 1 or dims[0] % block:
                raise self._damaged(f"tensor {name!r} has dimensions that its type cannot have", got=list(dims))
            info = GgufTensorInfo(
                name=name,
                shape=dims[::-1],
                kind=kind,
                kind_name=names[kind],
                path=self._path,
                offset=start + offset,
                row_bytes=dims[0] // block * block_bytes,
            )
            if offset % alignment or info.offset + info.num_bytes > self._size:
                raise self._damaged(
                    f"tensor {name!r} lies outside of the file or at no multiple of {alignment} bytes",
                    got=f"{info.num_bytes} bytes from byte {info.offset}",
                    wanted=f"inside {self._size} bytes",
                )
            tensors[name] = info
        end, before = start, ""
        for info in sorted(tensors.values(), key=lambda info: info.offset):
            if info.offset < end:
                raise self._damaged(f"tensors {before!r} and {info.name!r} overlap")
            end, before = info.offset + info.num_bytes, info.name
        return tensors


def _type_table() -> tuple[dict[int, tuple[int, int]], dict[int, str]]:
    """Return ggml type -> (numbers, bytes) of a block, and -> its name."""
    table = gguf_package().GGML_QUANT_SIZES
    return {int(kind): sizes for kind, sizes in table.items()}, {int(kind): kind.name for kind in table}


def dequantiser(info: GgufTensorInfo) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Return what makes float32 rows of a tensor's bytes, (rows, row bytes) uint8 -> (rows, columns).

    Raises UnsupportedError for a type that the gguf package cannot dequantise; that is found on one block of zeros.
    """
    package = gguf_package()
    kind = package.GGMLQuantizationType(info.kind)
    try:
        package.dequantize(np.zeros((1, _type_table()[0][info.kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise UnsupportedError(
            f"tensor {info.name!r} is of a type that cannot be dequantised",
            where=str(info.path),
            got=info.kind_name,
            do="start from a GGUF file of another quantisation, or from the Hugging Face checkpoint",
        ) from None
    return lambda rows: package.dequantize(rows, kind)


def read_rows(info: GgufTensorInfo, first: int, last: int) -> np.ndarray[Any, Any]:
    """Read rows `first` up to `last`, (rows, row bytes) uint8. Raises CheckpointError if the file ends there."""
    data = np.empty((last - first, info.row_bytes), np.uint8)
    try:
        with info.path.open("rb") as handle:
            handle.seek(info.offset + first * info.row_bytes)
            count = handle.readinto(data.reshape(-1))  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise CheckpointError("the GGUF file cannot be read", where=str(info.path), got=str(error)) from None
    if count != data.size:
        raise CheckpointError("the GGUF file became shorter while it was read", where=str(info.path))
    return data
