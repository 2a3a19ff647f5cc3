"""Which source a run uses when none is named, and the windows of the one that is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from structprune.calibration import SOURCES
from structprune.calibration.context import CalibrationWindows, SourceContext, TextWindows, behind_start
from structprune.calibration.sources import packed
from structprune.calibration.sources.file import file_windows, read_text
from structprune.errors import InputError
from structprune.files import expand_user
from structprune.texts import AUTO, MIX, WeightedText, shares
from structprune.types import Render


def load_texts(
    texts: Sequence[WeightedText], context: SourceContext, notify: Callable[[str], None]
) -> tuple[str, CalibrationWindows]:
    """Draw the windows of every text, as many as its weight says, and mix them evenly.

    However many windows are taken from the front, each text has its share of them. Where one has too few, the others
    give no more. Returns the names that were used, and the windows. Raises InputError as `load_windows` does.
    """
    if len(texts) == 1:
        return load_windows(texts[0].name, context, notify)
    weights = [text.weight for text in texts]
    wanted = shares(weights, context.num_samples)
    # One of each at least: what a text has lost can be said only where something was measured on it.
    held_out, repair = (
        shares(weights, max(number, len(texts))) if number else [0] * len(texts)
        for number in (context.num_held_out, context.num_repair)
    )
    drawn = [
        load_windows(text.name, replace(context, num_samples=n, num_held_out=h, num_repair=r, min_samples=1), notify)
        for text, n, h, r in zip(texts, wanted, held_out, repair, strict=True)
    ]
    parts = [windows for _, windows in drawn]
    fitted, apart, taught = (
        _mixed([0 if ids_NS is None else len(ids_NS) for ids_NS in each])
        for each in zip(*((part.ids_NS, part.held_out_NS, part.repair_NS) for part in parts), strict=True)
    )
    return ", ".join(name for name, _ in drawn), CalibrationWindows(
        ids_NS=torch.stack([parts[text].ids_NS[number] for text, number in fitted]),
        repair_NS=torch.stack([_there(parts[text].repair_NS)[number] for text, number in taught]) if taught else None,
        description="; ".join(f"{len(part.ids_NS)} windows of {part.description}" for part in parts),
        start=context.start.text,
        held_out_NS=torch.stack([_there(parts[text].held_out_NS)[number] for text, number in apart]) if apart else None,
        set_apart=any(part.set_apart for part in parts),
        texts=tuple(
            TextWindows(
                name=name,
                description=part.description,
                weight=text.weight,
                windows=tuple(place for place, (of, _) in enumerate(fitted) if of == number),
                held_out=tuple(place for place, (of, _) in enumerate(apart) if of == number),
                repair=tuple(place for place, (of, _) in enumerate(taught) if of == number),
            )
            for number, (text, (name, part)) in enumerate(zip(texts, drawn, strict=True))
        ),
    )


def _mixed(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Order (text, number of a window of it), so that each stretch has every text's share."""
    places = [((number + 0.5) / count, text, number) for text, count in enumerate(counts) for number in range(count)]
    return [(text, number) for _, text, number in sorted(places)]


def _there(ids_NS: Tensor | None) -> Tensor:
    assert ids_NS is not None
    return ids_NS


def check_texts(texts: Sequence[WeightedText]) -> None:
    """Raise InputError for a name that is neither a source nor a file, before anything is read."""
    for text in texts:
        path = expand_user(text.name)
        if text.name != AUTO and text.name not in SOURCES and not (path.exists() or "/" in text.name or path.suffix):
            raise InputError(
                f"unknown calibration {text.name!r}",
                wanted=f"{', '.join(SOURCES)}, {MIX}, or the path of a text or jsonl file",
            )


def load_windows(
    name: str | None, context: SourceContext, notify: Callable[[str], None]
) -> tuple[str, CalibrationWindows]:
    """Draw windows of the named source, or of the first of wikitext2, boolq, self that can be had.

    Each begins with the context's start. Returns the name that was used. Where held-out windows are asked for and the
    source gives none beside the others, some of those are set apart. Raises InputError for an unknown name or a text
    that is too short.
    """
    used, windows = _draw(name, replace(context, num_held_out=context.num_held_out + context.num_repair), notify)
    return used, windows.divided(context.num_held_out).with_held_out(context.num_held_out, context.min_samples)


def _draw(name: str | None, context: SourceContext, notify: Callable[[str], None]) -> tuple[str, CalibrationWindows]:
    if name is not None and name != AUTO:
        if name in SOURCES:
            return name, behind_start(SOURCES.get(name).draw, context)
        check_texts([WeightedText(name=name)])
        path = expand_user(name)
        return str(path), behind_start(lambda inner: file_windows(path, inner), context)
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


def held_out_text(
    name: str | Path, render: Render | None = None, notify: Callable[[str], None] = lambda said: None
) -> str:
    """Read a text to measure on: a file, or of `boolq` and `sciq` the passages that nothing is calibrated on.

    `render` turns the chats of a file into text; `notify` hears of what was not taken as it is. Raises InputError for a
    file that cannot be read, or if the package with the passages is missing.
    """
    found = packed.PACKED.get(str(name))
    return read_text(Path(name), render, notify) if found is None else found.split()[1]


def fingerprint(ids_NS: Tensor) -> str:
    """Hash token windows with SHA-256."""
    return hashlib.sha256(ids_NS.contiguous().numpy().tobytes()).hexdigest()
