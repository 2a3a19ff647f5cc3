"""Whether files hold what they held: their checksums, read again only where the system says that they may differ."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from structprune.errors import CheckpointError
from structprune.files import file_sum

# The checksum is as fast as memory on one core; more threads than this wait for the disk.
_THREADS = 4


def file_contents(paths: Iterable[Path], before: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Name -> `sum` ([bytes, CRC-32]) and `stamp` of each file, as JSON; raises OSError for one that is gone.

    A file whose stamp is the one in `before` was not written to, so its sum is taken from there. The stamp holds the
    time of the last change of any kind, which programs that restore a file's time cannot set.
    """
    known = before or {}
    found = {path.name: (path, _stamp(path)) for path in paths}
    stale = {name: path for name, (path, stamp) in found.items() if known.get(name, {}).get("stamp") != stamp}
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        sums = dict(zip(stale, pool.map(file_sum, stale.values()), strict=True))
    return {name: {"sum": sums.get(name) or known[name]["sum"], "stamp": stamp} for name, (_, stamp) in found.items()}


def check_unchanged(paths: Iterable[Path], before: Mapping[str, Any]) -> None:
    """Raise CheckpointError if one of the files does not hold what it held at the time of `before`."""
    now = sums(file_contents(paths, before))
    changed = [name for name, found in sums(before).items() if now.get(name) != found]
    if changed:
        raise CheckpointError(
            "a file of the source was written to while the run worked on it",
            got=", ".join(changed[:3]),
            do="start again in another -o, with a source that stays as it is",
        )


def sums(contents: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Name -> checksum, what two runs must agree on."""
    return {name: entry["sum"] for name, entry in contents.items()}


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
