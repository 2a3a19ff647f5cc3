"""The windows that a recovery learns from and those that it is only measured on.

Shape suffixes: N windows, S positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from structprune.calibration.context import CalibrationWindows, SourceContext
from structprune.calibration.select import load_windows
from structprune.errors import InputError
from structprune.recipe.training import RecoverySettings, num_kept_apart
from structprune.texts import MIX, weighted_texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """All windows, text after text."""

    names: tuple[str, ...]
    windows: CalibrationWindows
    train: tuple[tuple[int, ...], ...]
    """Numbers of the windows that are learned from, per text."""
    held_out: tuple[tuple[int, ...], ...]
    """Numbers of the windows that are held out, per text."""

    @property
    def all_train(self) -> tuple[int, ...]:
        return tuple(number for part in self.train for number in part)

    @property
    def all_held_out(self) -> tuple[int, ...]:
        return tuple(number for part in self.held_out for number in part)


def _names(settings: RecoverySettings) -> list[str]:
    """List the texts, a mix as those that it is of: each is a domain of its own, and none has a weight."""
    mixed = [text.name for text in weighted_texts((MIX,))]
    return [part for name in settings.calibration for part in (mixed if name == MIX else [name])]


def read_texts(settings: RecoverySettings, context: SourceContext, notify: Callable[[str], None]) -> Texts:
    """Draw the windows of every text in a seeded order; the last ones of each are held out.

    Raises InputError for a text that cannot be read, that is named twice, or that has too few windows.
    """
    if twice := [name for name in settings.calibration if settings.calibration.count(name) > 1]:
        raise InputError("a text is named twice", got=twice[0], wanted="each --calibration once")
    names: list[str] = []
    parts: list[CalibrationWindows] = []
    train: list[tuple[int, ...]] = []
    held_out: list[tuple[int, ...]] = []
    first = 0
    for asked in _names(settings) or (None,):
        name, windows = load_windows(asked, context, notify)
        found = len(windows.ids_NS)
        kept_apart = settings.held_out or num_kept_apart(found)
        if found <= kept_apart:
            raise InputError(
                "the text has no windows to learn from beside those held out",
                where=name,
                got=f"{found} windows of {context.seq_len} tokens, {kept_apart} held out",
                wanted=f"at least {kept_apart + 1}",
                do="give more text, or lower --seq-len or --held-out",
            )
        names.append(name)
        parts.append(windows)
        train.append(tuple(range(first, first + found - kept_apart)))
        held_out.append(tuple(range(first + found - kept_apart, first + found)))
        first += found
    return Texts(
        names=tuple(names),
        windows=CalibrationWindows(
            ids_NS=torch.cat([part.ids_NS for part in parts]),
            description="; ".join(part.description for part in parts),
            start=context.start.text,
        ),
        train=tuple(train),
        held_out=tuple(held_out),
    )
