"""What a killed run goes on from: folders that appear whole and synced, the newest one counts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from structprune.files import atomic_path, sync_directory, write_json

_META_NAME = "snapshot.json"
_IDENTITY_NAME = "identity.json"


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, whole and synced."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(temporary))


def claim(folder: Path, identity: Mapping[str, str]) -> str | None:
    """Make `folder` the state of the run of this identity; what another run left there goes.

    Returns the names of what differs from the run that left a state, or None if there was none or it is this one's.
    """
    path = folder / _IDENTITY_NAME
    found: Any = None
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found == dict(identity):
            return None
    had_state = folder.exists()
    if had_state:
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(path, dict(identity))
    if not had_state:
        return None
    differing = [name for name, value in identity.items() if not isinstance(found, dict) or found.get(name) != value]
    return ", ".join(differing)


class Snapshots:
    """Snapshots `snapshot-<step>` in one folder; there is only the newest one once `write` has returned."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole snapshot and what was said with it."""
        found = sorted(self._folder.glob(f"snapshot-*/{_META_NAME}"))
        if not found:
            return None
        return found[-1].parent, json.loads(found[-1].read_text(encoding="utf-8"))

    def write(self, step: int, meta: Mapping[str, Any], save: Callable[[Path], None]) -> None:
        """`save` fills the folder that it is given; older snapshots go when that is done."""
        staging = self._folder / f".snapshot.tmp-{os.getpid()}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save(staging)
        write_json(staging / _META_NAME, dict(meta))
        target = self._folder / f"snapshot-{step:09d}"
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
        sync_directory(self._folder)
        for path in self._folder.glob("snapshot-*"):
            if path != target:
                shutil.rmtree(path)
