"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Yield a temporary sibling to write to; on success it is synced and renamed to `path`, else removed."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        # Some writers create files for the owner alone; outputs follow the user's umask like any other file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def expand_user(path: str) -> Path:
    """`~` and `~user` expanded; a name that only looks like a user stays as it is."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sync_directory(path: Path) -> None:
    """Make a rename in `path` durable (a no-op where directories cannot be opened)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove what `atomic_path` was writing below `folder` when its process was killed."""
    for path in folder.rglob(".*.tmp-*"):
        if path.is_file():
            path.unlink()


def file_sum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file: enough to notice a flipped bit or a missing end, at the speed of the disk."""
    crc, size = 0, 0
    with path.open("rb", buffering=0) as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
    return [size, crc]


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, the quota or the largest file is used up."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    # safetensors has an error of its own, with the number in its text.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return found is not None and int(found[1]) in _FULL
