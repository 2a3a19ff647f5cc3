"""What a killed run goes on from: folders that appear whole and synced, the newest one counts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.errors import CheckpointError, first_line
from structprune.files import atomic_path, empty_folder, file_sum, sync_directory, write_json, write_text

_META_NAME = "snapshot.json"
Saved = TypeVar("Saved", bound=BaseModel)
Result = TypeVar("Result")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save tensors as one safetensors file, whole and synced, with its checksum."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(temporary))
    write_json(_sum_path(path), file_sum(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load what `save_tensors` wrote. Raises DamagedStateError for a file that is damaged or gone."""
    try:
        if file_sum(path) != json.loads(_sum_path(path).read_text(encoding="utf-8")):
            raise ValueError("its checksum is another one")
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _sum_path(path: Path) -> Path:
    """Return the path of the file's checksum."""
    return path.with_suffix(".sum")


def load_text(path: Path, kind: type[Saved]) -> Saved:
    """Load a value that was written as JSON. Raises DamagedStateError for a file that is damaged."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from None


class DamagedStateError(CheckpointError):
    """What a run was to go on from is not what was written."""


def _damaged(path: Path, error: Exception) -> DamagedStateError:
    return DamagedStateError("the state of an earlier run is damaged", where=str(path), got=first_line(error))


def going_on(
    work: Callable[[], Result], folder: Path, scratch: Path, damaged: Callable[[DamagedStateError], None]
) -> Result:
    """Run `work` with an empty scratch folder, from the snapshots in `folder`; anew if those are found damaged.

    `damaged` is told of it first. Raises what `work` raises.
    """
    empty_folder(scratch)
    try:
        return work()
    except DamagedStateError as error:
        damaged(error)
        empty_folder(folder)
        empty_folder(scratch)
        return work()


class Snapshots:
    """Snapshots `snapshot-<step>` in one folder; there is only the newest one once `write` has returned."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self, kind: type[Saved]) -> tuple[Path, Saved] | None:
        """Find the newest whole snapshot and the value saved with it. Raises DamagedStateError if that is damaged."""
        found = sorted(self._folder.glob(f"snapshot-*/{_META_NAME}"))
        return (found[-1].parent, load_text(found[-1], kind)) if found else None

    def write(self, step: int, meta: BaseModel, save: Callable[[Path], None]) -> None:
        """Write a snapshot, whose folder `save` fills; older ones are removed when that is done."""
        staging = self._folder / f".snapshot.tmp-{os.getpid()}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        save(staging)
        write_text(staging / _META_NAME, meta.model_dump_json())
        target = self._folder / f"snapshot-{step:09d}"
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
        sync_directory(self._folder)
        for path in self._folder.glob("snapshot-*"):
            if path != target:
                shutil.rmtree(path)
