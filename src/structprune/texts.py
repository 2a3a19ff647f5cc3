"""Texts as they are asked for: names, each with a weight behind a colon where it is not one; what is best for all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from structprune.files import expand_user

AUTO = "auto"
"""The first of the built-in texts that can be had."""
MIX = "mix"
"""Prose and program text, from what can be had."""
# Sums of such weights are finite, and so are shares of them.
_MOST_WEIGHT = 1e12
_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedText:
    """One text, and its share of the windows beside those of the others."""

    name: str
    """Name of a built-in text, or path of a file."""
    weight: float = 1.0

    @property
    def path(self) -> Path | None:
        """The file, where it is one; `FILE#FIELD` is one too."""
        path, _ = split_field(expand_user(self.name))
        return path if path.is_file() else None


ObjectiveName = Literal["mean", "worst"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is made of one figure per text where the choice with the least of it is taken."""

    of: Callable[[Sequence[float]], float]
    by_text: bool
    """Whether it needs the figures of each text: sums over the windows of all do not tell it."""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


OBJECTIVES: Mapping[ObjectiveName, Objective] = {
    "mean": Objective(of=_mean, by_text=False),
    "worst": Objective(of=max, by_text=True),
}
"""What a choice on held-out windows of several texts goes by: all of them together, or the text that fares worst."""

# Name of a text -> its weight in a mix, which counts as much as they do together.
_MIXED = {AUTO: 2.0, "python": 1.0}


def split_field(path: Path) -> tuple[Path, str | None]:
    """Split `FILE#FIELD` into file and field; a file that has such a name itself is taken as it is."""
    name, mark, field = path.name.rpartition("#")
    if not mark or not name or not field or path.exists():
        return path, None
    return path.with_name(name), field


def weighted_text(asked: str) -> WeightedText:
    """Split `TEXT:WEIGHT`; a file of such a name is taken as it is. Raises ValueError for a weight that is none."""
    match = _WEIGHT.fullmatch(asked)
    if match is None or _exists(asked):
        return WeightedText(name=asked)
    weight = float(match[2])
    if not weight > 0:
        raise ValueError(f"the weight of {match[1]} must be positive, got {match[2]}")
    if weight > _MOST_WEIGHT:
        raise ValueError(f"the weight of {match[1]} must be at most {_MOST_WEIGHT:g}")
    return WeightedText(name=match[1], weight=weight)


def weighted_texts(asked: Sequence[str]) -> tuple[WeightedText, ...]:
    """Split each, `mix` into its texts. Raises ValueError as `weighted_text` does, and for a text named twice."""
    texts = tuple(part for text in asked for part in _parts(weighted_text(text)))
    names = [text.name for text in texts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is named twice: give it a weight instead, such as {twice[0]}:2")
    return texts


def _parts(text: WeightedText) -> tuple[WeightedText, ...]:
    if text.name != MIX or _exists(MIX):
        return (text,)
    return tuple(WeightedText(name=name, weight=weight * text.weight) for name, weight in _MIXED.items())


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Share `total` windows out by weight: whole numbers, none of them zero, the largest remainders rounded up."""
    assert total >= len(weights)
    # One each first, so that a small weight does not vanish.
    exact = [1 + (total - len(weights)) * weight / sum(weights) for weight in weights]
    found = [int(number) for number in exact]
    for index in sorted(range(len(exact)), key=lambda i: found[i] - exact[i])[: total - sum(found)]:
        found[index] += 1
    return found


def shown_texts(asked: Sequence[str]) -> str:
    """Name the texts without their folders, for what is made to be published."""
    return ", ".join(Path(text).name for text in asked)


def _exists(asked: str) -> bool:
    try:
        return expand_user(asked).exists()
    except (OSError, ValueError):
        # No name that a file could have.
        return False
