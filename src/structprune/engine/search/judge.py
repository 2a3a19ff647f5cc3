"""The final judgement: whether a choice of widths loses less than another on windows that no search has seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from structprune.texts import Objective

ENOUGH_ERRORS = 2.0
"""A gain counts from so many standard errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """How much less one choice loses than another on the same windows, in nats per token."""

    gain: float
    standard_error: float

    @property
    def counts(self) -> bool:
        """Whether it is more than chance gives."""
        return self.gain > ENOUGH_ERRORS * self.standard_error


def figure(losses: Sequence[float], texts: Sequence[int], objective: Objective) -> float:
    """Make one number of a choice's losses; `texts` has the text of each window, of which every text has as many."""
    if not objective.by_text:
        return sum(losses) / len(losses)
    return objective.of(of_each_text(losses, texts))


def of_each_text(losses: Sequence[float], texts: Sequence[int]) -> list[float]:
    """Average losses by text; `texts` has the text of each window, ascending."""
    by_text: dict[int, list[float]] = {}
    for loss, text in zip(losses, texts, strict=True):
        by_text.setdefault(text, []).append(loss)
    return [sum(each) / len(each) for each in by_text.values()]


def harms_none(before: Sequence[float], after: Sequence[float], texts: Sequence[int], objective: Objective) -> bool:
    """Return whether no text loses more, or the objective says itself which text counts."""
    pairs = zip(of_each_text(before, texts), of_each_text(after, texts), strict=True)
    return objective.by_text or all(new <= old for old, new in pairs)


def compared(before: Sequence[float], after: Sequence[float], texts: Sequence[int], objective: Objective) -> Gain:
    """Compare two choices window by window.

    The standard error is the jackknife's: what the gain would be without each of the windows. For the mean it is that
    of the paired differences. It is infinite for a single window of a text.
    """

    def gain_without(left_out: int | None) -> float:
        kept = [place for place in range(len(texts)) if place != left_out]
        of_texts = [texts[place] for place in kept]
        one, other = ([losses[place] for place in kept] for losses in (before, after))
        return figure(one, of_texts, objective) - figure(other, of_texts, objective)

    gain, number = gain_without(None), len(texts)
    if min(list(texts).count(text) for text in set(texts)) < 2:
        return Gain(gain=gain, standard_error=math.inf)
    left = [gain_without(place) for place in range(number)]
    mean = sum(left) / number
    variance = (number - 1) / number * sum((value - mean) ** 2 for value in left)
    return Gain(gain=gain, standard_error=math.sqrt(variance))
