"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from structprune.errors import CheckpointError, InputError, StructPruneError, first_line

Model = TypeVar("Model", bound=BaseModel)
_CHUNK_BYTES = 2**20
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
DEFAULT_SHARD_BYTES = 5 * 10**9
"""The largest weight file of an output where no size is given."""
# Bytes of a path and of one name in it, on Linux.
_MAX_PATH, _MAX_NAME = 4095, 255
# A file of settings or of a model's description; the largest real ones, indices of 100,000 tensors, have a tenth.
_JSON_BYTES = 128 * 2**20
# Their files say that they are empty, and some never end.
_KERNEL_FOLDERS = (Path("/proc"), Path("/sys"))
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


def check_regular(path: Path, kind: type[StructPruneError] = InputError) -> None:
    """Raise `kind` for a pipe, a device, a socket or a file of the kernel: reading it may never end.

    Raises OSError where there is nothing, or nothing that may be looked at.
    """
    mode = path.stat().st_mode
    named = {stat.S_ISFIFO: "a pipe", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISSOCK: "a socket"}
    got = next((name for is_such, name in named.items() if is_such(mode)), None)
    if got is None and stat.S_ISREG(mode) and any(map(path.resolve().is_relative_to, _KERNEL_FOLDERS)):
        got = "a file of the kernel"
    if got is not None:
        raise kind(
            "the file has no size and may have no end",
            where=str(path),
            got=got,
            wanted="a file on a disk",
            do="save its content as a file first",
        )


def check_path(path: str | Path, what: str, *, spare: int = 0) -> None:
    """Raise InputError for a path that no file can have, or whose name cannot be written into a report.

    `what` names it in the message; `spare` bytes are added to its last part by endings such as `.partial`.
    """
    text = str(path)
    shown = os.fsencode(text).decode("utf-8", "backslashreplace") if "\0" not in text else text.replace("\0", "\\0")
    problem = None
    if any("\ud800" <= character <= "\udfff" for character in text) or "\0" in text:
        problem = "is not text in UTF-8"
    elif len(os.fsencode(text)) > _MAX_PATH or any(
        len(os.fsencode(part)) + (spare if part == Path(text).name else 0) > _MAX_NAME for part in Path(text).parts
    ):
        problem = "is too long"
    if problem is not None:
        raise InputError(f"the name of {what} {problem}", got=shown[:200], do="rename it, or choose another name")


def plain_name(name: str) -> str:
    """Return a name that neither Markdown nor HTML reads as anything else: other characters as an underscore.

    Names of files and models come from outside and may hold line breaks, tags and links.
    """
    return re.sub(r"[^\w .,:;@/+()%=#~'\"-]", "_", name)


def make_folder(path: Path, what: str) -> None:
    """Make a folder and those above it, where they are not there. Raises InputError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder of {what} cannot be made", where=str(path), got=error.strerror, do="choose another place"
        ) from None


def read_json(path: Path, *, do: str | None = None, once: bool = False) -> dict[str, Any]:
    """Read the JSON object in a regular file of bounded size. Raises CheckpointError that says what is wrong.

    Of an entry that an object has twice the last counts, as in stock code; with `once` that is an error too.
    """
    try:
        check_regular(path, CheckpointError)
        size = path.stat().st_size
        if size > _JSON_BYTES:
            raise CheckpointError(
                "the file is too large for what it describes",
                where=str(path),
                got=f"{size:,} bytes",
                wanted=f"at most {_JSON_BYTES:,}",
            )
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_each_once if once else None)
        if _HALF.search(text):
            # Half a character can be escaped, and what quotes it could not be written.
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise CheckpointError("the file is missing", where=str(path), do=do) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("the file cannot be read as JSON", where=str(path), got=first_line(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError("the file does not hold a JSON object", where=str(path), got=type(value).__name__)
    return value


def read_validated(path: Path, kind: type[Model], flag: str, wanted: str) -> Model:
    """Read a JSON file that a command has written as the settings `kind`, which `flag` asks for.

    Raises InputError that names the file and the entry, CheckpointError for a file that is no JSON object.
    """
    try:
        return kind.model_validate(read_json(path, once=True))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{flag} is not usable: {first['msg'].lower()}",
            where=f"{path}: {', '.join(map(str, first['loc'][:4]))}",
            got=repr(first.get("input"))[:80],
            wanted=wanted,
        ) from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def expand_user(path: str) -> Path:
    """Expand `~` and `~user`; a name that only looks like a user stays as it is."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def empty_folder(path: Path) -> None:
    """Make it a folder with nothing in it."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()


@contextlib.contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """Yield a temporary folder beside `path` to fill; on success it is renamed to `path`, else it is removed."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        # It was made for the owner alone; outputs follow the user's umask like any other folder.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        temporary.rename(path)
        sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    """Return [bytes, CRC-32] of a file: enough to notice a flipped bit or a missing end, at the disk's speed."""
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
