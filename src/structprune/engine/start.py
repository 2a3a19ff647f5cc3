"""The start of a run, or of its going on: what makes two runs the same one, and the windows that they read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from structprune.calibration.context import CalibrationWindows
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.finish import versions
from structprune.errors import InputError
from structprune.recipe import Recipe
from structprune.runs.directory import RunDirectory

_WINDOWS = "windows"


def identity(reader: CheckpointReader, recipe: Recipe) -> dict[str, Any]:
    """As JSON. `recipe` is resolved but for what calibration text and memory decide.

    The source's content is not read for it: a file that was written to is another one.
    """
    return {
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe.fingerprint(),
        "source": reader.fingerprint(),
        "source_files": reader.stamps(),
        "versions": versions(),
    }


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], staging: Path) -> None:
    """Raise InputError that shows the difference, if the run that was cut is another one than the one that is asked."""
    for part, what in (
        ("recipe", "with other settings"),
        ("source", "from another source checkpoint"),
        ("source_files", "from another source checkpoint (a file was written since)"),
        ("versions", "by other versions"),
        ("windows", "on another calibration text"),
    ):
        if before[part] != now[part]:
            raise InputError(
                f"the unfinished run here was started {what}",
                where=str(staging),
                got=_difference(now[part], before[part]),
                wanted=_difference(before[part], now[part]),
                do=f"ask for the same, remove {staging} to start again, or choose another -o",
            )


def _difference(shown: Any, other: Any) -> str:
    """The entries in which `shown` is not `other`."""
    if not isinstance(shown, dict) or not isinstance(other, dict):
        return str(shown)[:12]
    return ", ".join(f"{name} {value}" for name, value in shown.items() if other.get(name) != value) or "none"


def keep_windows(run: RunDirectory, name: str, windows: CalibrationWindows) -> None:
    """Keep the windows for a process that goes on: they may have been sampled, or their text may be gone by then."""
    path = run.staging / "windows.safetensors"
    save_file({"ids": windows.ids_NS.contiguous()}, path)
    run.journal.record(_WINDOWS, [path], name=name, description=windows.description)


def find_windows(run: RunDirectory) -> tuple[str, CalibrationWindows] | None:
    """The name of their source, and the windows that were kept; None if there are none."""
    line = run.journal.find(_WINDOWS)
    if line is None:
        return None
    ids_NS = load_file(run.staging / "windows.safetensors")["ids"]
    return line["name"], CalibrationWindows(ids_NS=ids_NS, description=line["description"])
