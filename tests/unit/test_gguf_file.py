"""The container of a GGUF file: what a header may say of its sizes, and the message for one that says more."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from structprune.checkpoint.gguf_file import dequantiser, read_gguf, read_rows
from structprune.errors import CheckpointError, StructPruneError, UnsupportedError

gguf = pytest.importorskip("gguf")

F32, Q8_0 = 0, 8
U32, FLOAT, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def tensor(name: bytes, dims: Sequence[int], kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def write(
    path: Path,
    *,
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
) -> Path:
    """A file by hand; `counts` are the numbers of tensors and keys that it says."""
    said = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, *said) + b"".join((*keys, *tensors))
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.gguf"


def test_what_a_header_says(path: Path) -> None:
    keys = [
        key(b"general.architecture", STRING, text(b"llama")),
        key(b"a.count", U32, number(7)),
        key(b"a.flag", BOOL, b"\1"),
        key(b"a.share", FLOAT, struct.pack("<f", 0.5)),
        key(b"a.names", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"x") + text("\u00e9".encode())),
        key(b"a.numbers", ARRAY, struct.pack("<IQ3I", U32, 3, 1, 2, 3)),
        key(b"a.nested", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQI", U32, 1, 5)),
    ]
    values = np.arange(6, dtype=np.float32)
    header = read_gguf(write(path, keys=keys, tensors=[tensor(b"w", [3, 2])], data=values.tobytes()))
    metadata = dict(header.metadata)
    assert metadata.pop("a.numbers").tolist() == [1, 2, 3]
    assert [part.tolist() for part in metadata.pop("a.nested")] == [[5]]
    assert metadata == {
        "general.architecture": "llama",
        "a.count": 7,
        "a.flag": True,
        "a.share": 0.5,
        "a.names": ["x", "\u00e9"],
    }
    info = header.tensors["w"]
    assert (info.shape, info.num_rows, info.row_bytes) == ((2, 3), 2, 12)
    assert dequantiser(info)(read_rows(info, 1, 2)).tolist() == [[3.0, 4.0, 5.0]]


def test_quantised_rows(path: Path) -> None:
    """Q8_0: a scale in float16 and 32 bytes for 32 numbers."""
    block = np.float16(0.25).tobytes() + np.arange(-16, 16, dtype=np.int8).tobytes()
    info = read_gguf(write(path, tensors=[tensor(b"w", [32, 2], Q8_0)], data=block * 2)).tensors["w"]
    assert info.row_bytes == 34
    assert dequantiser(info)(read_rows(info, 1, 2)).tolist() == [[0.25 * value for value in range(-16, 16)]]


HUGE = 2**40
DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "no magic": ({"magic": b"GGML"}, "does not begin as one"),
    "no version": ({"version": 0}, "no version has this number; got 0"),
    "keys that are not there": ({"counts": (0, HUGE)}, f"more metadata entries than the file has room for; got {HUGE}"),
    "tensors that are not there": ({"counts": (HUGE, 0)}, "more tensors than the file has room for"),
    "a key without end": ({"keys": [struct.pack("<Q", HUGE) + b"\0" * 64]}, "metadata key is too long"),
    "a text without end": (
        {"keys": [key(b"a", STRING, struct.pack("<Q", HUGE))]},
        f"beyond the end of the file; got {HUGE} bytes for a",
    ),
    "an array without end": (
        {"keys": [key(b"a", ARRAY, struct.pack("<IQ", U32, HUGE))]},
        f"beyond the end of the file; got {4 * HUGE} bytes for a",
    ),
    "texts without end": (
        {"keys": [key(b"a", ARRAY, struct.pack("<IQ", STRING, HUGE))]},
        "more items of 'a' than the file has room for",
    ),
    "arrays in arrays": (
        {"keys": [key(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9 + b"\0" * 64)]},
        "has a type that the format does not know; got 9",
    ),
    "an unknown type": ({"keys": [key(b"a", 77, b"\0" * 64)]}, "has a type that the format does not know; got 77"),
    "not UTF-8": ({"keys": [key(b"a", STRING, text(b"\xff\xfe"))]}, "a is not UTF-8"),
    "a key twice": ({"keys": [key(b"a", U32, number(1))] * 2}, "'a' is there twice"),
    "an alignment of three": ({"keys": [key(b"general.alignment", U32, number(3))]}, "no power of two; got 3"),
    "no dimensions": ({"tensors": [tensor(b"w", [])], "data": b"\0" * 64}, "'w' has 0 dimensions"),
    "too many dimensions": ({"tensors": [tensor(b"w", [1] * 9)], "data": b"\0" * 64}, "'w' has 9 dimensions"),
    "a dimension of zero": ({"tensors": [tensor(b"w", [0, 2])]}, "dimensions that its type cannot have"),
    "half a block": ({"tensors": [tensor(b"w", [33], Q8_0)], "data": b"\0" * 64}, "dimensions that its type cannot"),
    "an unknown tensor type": ({"tensors": [tensor(b"w", [1], 999)]}, "a type that the gguf package does not know"),
    "a tensor beyond the end": (
        {"tensors": [tensor(b"w", [8, 8])], "data": b"\0" * 252},
        "outside of the file or at no multiple of 32 bytes; got 256 bytes",
    ),
    "a tensor of all memory": ({"tensors": [tensor(b"w", [HUGE, HUGE])]}, "'w' lies outside of the file"),
    "an offset beyond the end": ({"tensors": [tensor(b"w", [1], offset=2**63)]}, "'w' lies outside of the file"),
    "an odd offset": ({"tensors": [tensor(b"w", [1], offset=4)], "data": b"\0" * 64}, "at no multiple of 32 bytes"),
    "tensors over each other": (
        {"tensors": [tensor(b"v", [16]), tensor(b"w", [16], offset=32)], "data": b"\0" * 128},
        "tensors 'v' and 'w' overlap",
    ),
    "a tensor twice": ({"tensors": [tensor(b"w", [1])] * 2, "data": b"\0" * 64}, "'w' is there twice"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_sizes_are_compared_with_the_file(case: str, path: Path) -> None:
    changes, message = DAMAGED[case]
    with pytest.raises(CheckpointError) as caught:
        read_gguf(write(path, **changes))
    assert message in str(caught.value)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(("version", "got"), [(1, "version 1"), (4, "version 4"), (3 << 24, "a big-endian file")])
def test_other_versions(version: int, got: str, path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"got {got}, wanted version 2 or 3"):
        read_gguf(write(path, version=version))


def test_every_beginning_of_a_file_is_refused(path: Path) -> None:
    """Cut anywhere, it is an error of ours, never another one."""
    keys = [key(b"a", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"x")), key(b"b", U32, number(1))]
    whole = write(path, keys=keys, tensors=[tensor(b"w", [8])], data=b"\0" * 32).read_bytes()
    read_gguf(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_gguf(path)


def test_every_changed_byte_is_read_or_refused(path: Path) -> None:
    """A flipped bit gives another header or an error of ours, in no time and no memory."""
    keys = [key(b"general.alignment", U32, number(32)), key(b"a", ARRAY, struct.pack("<IQ2I", U32, 2, 1, 2))]
    whole = write(path, keys=keys, tensors=[tensor(b"w", [8])], data=b"\0" * 32).read_bytes()
    for place in range(len(whole) - 32):
        for bit in (1, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            with contextlib.suppress(StructPruneError):
                read_gguf(path)


def part(folder: Path, place: int, count: int, name: bytes, **keys: int) -> Path:
    said = {"split.no": place - 1, "split.count": count} | {k.replace("_", "."): v for k, v in keys.items()}
    entries = [key(k.encode(), U32, number(v)) for k, v in said.items()]
    return write(
        folder / f"m-{place:05d}-of-{count:05d}.gguf", keys=entries, tensors=[tensor(name, [8])], data=b"\0" * 32
    )


def test_parts_of_a_split_file(tmp_path: Path) -> None:
    parts = [part(tmp_path, 1, 2, b"v"), part(tmp_path, 2, 2, b"w")]
    for path in parts:
        header = read_gguf(path)
        assert header.paths == tuple(parts)
        assert {name: info.path for name, info in header.tensors.items()} == {"v": parts[0], "w": parts[1]}
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"part 1 of 2 .* missing; got no m-00002-of-00002\.gguf"):
        read_gguf(parts[0])
    part(tmp_path, 2, 2, b"v")
    with pytest.raises(CheckpointError, match="'v' is in two parts"):
        read_gguf(parts[0])
    part(tmp_path, 2, 2, b"w", split_no=0)
    with pytest.raises(CheckpointError, match=r"another place .* got split\.no 0, split\.count 2"):
        read_gguf(parts[0])
    part(tmp_path, 2, 2, b"w")
    part(tmp_path, 1, 2, b"v", split_tensors_count=3)
    with pytest.raises(CheckpointError, match=r"another number of tensors .* got 2, wanted 3"):
        read_gguf(parts[0])


def test_a_part_under_another_name(tmp_path: Path) -> None:
    path = part(tmp_path, 1, 2, b"v").rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"wanted a name that ends in -00001-of-00002\.gguf"):
        read_gguf(path)
