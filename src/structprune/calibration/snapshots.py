"""Hidden states kept for a process that goes on with the run: the newest ones, with checksums.

They are written seldom enough to take a small share of the time, and the old ones are removed only once the new ones
are whole. Nothing is synced: what a power cut took is found damaged, and computed again.
"""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.calibration.store import HiddenStore, dump, fill, num_bytes
from structprune.files import file_sum, write_json
from structprune.ranks import ALONE, Ranks

# Share of the time that may go into snapshots.
SHARE = 0.02
# Until one was written and timed: a slow disk.
_ASSUMED_BYTES_PER_S = 2**28
_STATE_NAME = "state.json"
_TENSORS = "tensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What was kept at one position."""

    position: int
    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    folder: Path
    ranks: Ranks = ALONE

    def restore(self, stores: Mapping[str, HiddenStore]) -> None:
        """Fill the stores with the hidden states that were kept under their names."""
        for name, store in stores.items():
            fill(store, self.folder / _file_name(self.position, name), self.ranks)


class Snapshots:
    """The newest snapshot of one loop, in a folder of its own. Stores keep their shapes.

    Each rank writes its own windows, at their places in the run; the first does the rest, and decides when.
    """

    def __init__(self, folder: Path, notify: Callable[[str], None], ranks: Ranks = ALONE) -> None:
        self._folder = folder
        self._notify = notify
        self._ranks = ranks
        self._last = time.monotonic()
        self._took_s: float | None = None

    def keep(
        self,
        position: int,
        stores: Mapping[str, HiddenStore],
        tensors: Mapping[str, Tensor] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep all that `position` needs, if the time has come."""
        started = time.monotonic()
        paths = {name: self._folder / _file_name(position, name) for name in stores}
        if not self._ranks.broadcast(lambda: self._begin(stores.values(), paths.values(), started)):
            return
        files = {paths[name].name: dump(store, paths[name], self._ranks) for name, store in stores.items()}
        self._ranks.barrier()
        self._ranks.broadcast(lambda: self._end(position, files, tensors, values, started))

    def _begin(self, stores: Iterable[HiddenStore], paths: Iterable[Path], started: float) -> bool:
        """Whether the time has come; if so, the files are there, empty."""
        took_s = self._took_s
        if took_s is None:
            took_s = sum(num_bytes(store) for store in stores) / _ASSUMED_BYTES_PER_S
        if (started - self._last) * SHARE < took_s:
            return False
        self._folder.mkdir(exist_ok=True)
        for path in paths:
            path.write_bytes(b"")
        return True

    def _end(
        self,
        position: int,
        files: dict[str, list[int]],
        tensors: Mapping[str, Tensor] | None,
        values: Mapping[str, Any] | None,
        started: float,
    ) -> None:
        if self._ranks.size > 1:
            # What the others wrote has no sum yet.
            files = {name: file_sum(self._folder / name) for name in files}
        if tensors:
            path = self._folder / _file_name(position, _TENSORS)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            files[path.name] = file_sum(path)
        state: dict[str, Any] = {"position": position, "values": dict(values or {}), "files": files}
        write_json(self._folder / _STATE_NAME, state | {"check": _check(state)})
        for path in self._folder.iterdir():
            if path.name not in files and path.name != _STATE_NAME:
                path.unlink()
        self._last = time.monotonic()
        self._took_s = self._last - started

    def load(self) -> Snapshot | None:
        """Load the newest snapshot, if there is one and all of it is as it was written."""
        found = self._ranks.broadcast(self._load)
        return None if found is None else replace(found, ranks=self._ranks)

    def _load(self) -> Snapshot | None:
        path = self._folder / _STATE_NAME
        if not path.exists():
            return None
        state = _read_state(path)
        if state is None:
            self._notify(f"{path} is damaged; the hidden states are computed again")
            return None
        for name, recorded in state["files"].items():
            part = self._folder / name
            if not part.is_file() or file_sum(part) != recorded:
                self._notify(f"{part} is damaged; the hidden states are computed again")
                return None
        tensors = self._folder / _file_name(state["position"], _TENSORS)
        return Snapshot(
            position=state["position"],
            values=state["values"],
            tensors=load_file(tensors) if tensors.name in state["files"] else {},
            folder=self._folder,
        )

    def behind(self, done: Sequence[bool]) -> Snapshot | None:
        """Load the newest snapshot, if all positions in front of it are done; one that is of no use is removed."""
        found = self.load()
        if found is None or not all(done[: found.position]):
            self.discard()
            return None
        return found

    def discard(self) -> None:
        """Remove what was kept."""
        self._ranks.broadcast(self._discard)

    def _discard(self) -> None:
        # First: the rest means nothing without it.
        (self._folder / _STATE_NAME).unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)


def _read_state(path: Path) -> dict[str, Any] | None:
    """Read what `keep` wrote, or None if it is not that any more."""
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))
        return state if state.pop("check") == _check(state) else None
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _file_name(position: int, name: str) -> str:
    return f"{position}.{name}"


def _check(state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state).encode())
