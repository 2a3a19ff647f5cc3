"""Which source a run uses when none is named, and the windows of the one that is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from structprune.calibration import SOURCES
from structprune.calibration.context import CalibrationWindows, SourceContext, behind_start
from structprune.calibration.sources import packed
from structprune.calibration.sources.file import file_windows, read_text
from structprune.errors import InputError
from structprune.files import expand_user
from structprune.types import Render


def load_windows(
    name: str | None, context: SourceContext, notify: Callable[[str], None]
) -> tuple[str, CalibrationWindows]:
    """Draw windows of the named source, or of the first of wikitext2, boolq, self that can be had.

    Each begins with the context's start. Returns the name that was used. Raises InputError for an unknown name or a
    text that is too short.
    """
    if name is not None and name != "auto":
        if name in SOURCES:
            return name, behind_start(SOURCES.get(name).draw, context)
        path = expand_user(name)
        if path.exists() or "/" in name or path.suffix:
            return str(path), behind_start(lambda inner: file_windows(path, inner), context)
        raise InputError(
            f"unknown calibration {name!r}", wanted=f"{', '.join(SOURCES)}, or the path of a text or jsonl file"
        )
    preferred = "wikitext2"
    source = SOURCES.get(preferred)
    if source.missing:
        notify(f"no --calibration given; {preferred} needs the {source.missing[0]} package")
    elif os.environ.get("HF_HUB_OFFLINE", "0") in ("1", "true", "yes", "on"):
        notify(f"no --calibration given; {preferred} is not tried because HF_HUB_OFFLINE is set")
    else:
        try:
            return preferred, behind_start(source.draw, context)
        except InputError as error:
            notify(f"no --calibration given; {error}")
    chosen = "boolq" if packed.is_installed() else "self"
    notify(f"calibrating on {chosen}; the domain of this text decides more than the method (docs/footguns.md)")
    return chosen, behind_start(SOURCES.get(chosen).draw, context)


def held_out_text(name: str | Path, render: Render | None = None) -> str:
    """Read a text to measure on: a file, or of `boolq` and `sciq` the passages that nothing is calibrated on.

    `render` turns the chats of a file into text. Raises InputError for a file that cannot be read, or if the package
    with the passages is missing.
    """
    found = packed.PACKED.get(str(name))
    return read_text(Path(name), render) if found is None else found.split()[1]


def fingerprint(windows: CalibrationWindows) -> str:
    """Return the SHA-256 of the token windows."""
    return hashlib.sha256(windows.ids_NS.contiguous().numpy().tobytes()).hexdigest()
