"""What single sublayers lose at a width, measured: the dense model with one of them changed, or two that are gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from structprune.allocation.corrected import Anchors
from structprune.allocation.menu import Choice, Slot

Losses = Callable[[Sequence[Choice]], Sequence[float]]
"""Choices -> what each loses, all on the same windows."""


def measure_anchors(slots: Sequence[Slot], start: Choice, losses: Losses) -> Anchors:
    """Measure every slot at one width: that of `start`, or where it keeps all or none the share that others keep.

    Where slots may go each is measured without any units too, and each two of a kind that follow one another.
    """
    largest = tuple(0 for _ in slots)

    partial = {number: place for number in range(len(slots)) if (place := _anchor(slots, start, number)) is not None}
    gone = [number for number, slot in enumerate(slots) if slot.variants[-1].keep == 0 and slot.variants[0].keep]
    pairs = [(one, other) for one in gone for other in gone if _follows(slots, one, other)]
    asked: list[dict[int, int]] = [
        *({number: place} for number, place in partial.items()),
        *({number: len(slots[number].variants) - 1} for number in gone),
        *({number: len(slots[number].variants) - 1 for number in pair} for pair in pairs),
    ]
    choices = [tuple(places.get(number, place) for number, place in enumerate(largest)) for places in asked]
    found = iter(losses(choices))
    return Anchors(
        partial={number: (place, next(found)) for number, place in partial.items()},
        gone={number: next(found) for number in gone},
        pairs={pair: next(found) for pair in pairs},
    )


def _anchor(slots: Sequence[Slot], start: Choice, number: int) -> int | None:
    """Choose the variant that is measured; None where none keeps a part of the units."""
    slot = slots[number]
    full = slot.variants[0].keep
    partial = [place for place, variant in enumerate(slot.variants) if 0 < variant.keep < full]
    if not partial:
        return None
    if start[number] in partial:
        return start[number]
    kept = sum(one.variants[place].cost[0] for one, place in zip(slots, start, strict=True))
    share = kept / max(1, sum(one.variants[0].cost[0] for one in slots))
    return min(partial, key=lambda place: abs(slot.variants[place].keep - share * full))


def _follows(slots: Sequence[Slot], one: int, other: int) -> bool:
    """Say whether a slot is the next one of its kind."""
    return slots[one].kind == slots[other].kind and slots[other].block == slots[one].block + 1
