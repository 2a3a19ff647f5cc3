"""Predicted losses that are corrected by measurements of a few widths, and the exact choice for them.

What each removal costs is a prediction from the curvature at the dense model. One width of every slot alone, measured,
says by what factor the prediction is wrong there; the shape over widths stays. A slot that is gone lies on no curve:
it is measured itself. And two neighbours that are both gone lose more than their sum, or less, which is measured too:
on SmolLM2 a run of MLPs in the middle lost two to three times the sum, where widths of different blocks add up.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from structprune.allocation.exact import least_loss
from structprune.allocation.menu import Budget, Choice, Slot, Variant, total_price

_MOST_TURNS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchors:
    """Measured losses of the dense model with one slot, or two, changed; by the slots' numbers."""

    partial: Mapping[int, tuple[int, float]]
    """Slot -> (position of a variant that keeps some units, its loss)."""
    gone: Mapping[int, float] = field(default_factory=dict[int, float])
    """Slot -> loss without it."""
    pairs: Mapping[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    """Two slots -> loss without both."""

    def factor(self, slots: Sequence[Slot], number: int) -> float:
        """Return measured over predicted loss of a slot; 1 where nothing was predicted or measured."""
        if number not in self.partial:
            return 1.0
        place, loss = self.partial[number]
        predicted = slots[number].variants[place].price
        return loss / predicted if predicted > 0 else 1.0

    def corrected(self, slots: Sequence[Slot]) -> list[Slot]:
        """Return the slots with the losses that follow from what was measured of each alone.

        Below the measured width a prediction is raised by its factor but not lowered: by no less than what is usual.
        On SmolLM2 a block whose last units carry all of a predicted 61 nats lost a tenth of the prediction at half
        width, which says nothing of those units.
        """
        usual = statistics.median([self.factor(slots, number) for number in self.partial] or [1.0])
        return [self._corrected(slot, number, self.factor(slots, number), usual) for number, slot in enumerate(slots)]

    def _corrected(self, slot: Slot, number: int, factor: float, usual: float) -> Slot:
        place = self.partial[number][0] if number in self.partial else 0
        measured, gone = slot.variants[place], self.gone.get(number)

        def price(variant: Variant) -> float:
            if variant.keep == 0 and gone is not None:
                return gone
            if variant.keep >= measured.keep:
                return variant.price * factor
            return measured.price * factor + (variant.price - measured.price) * max(factor, usual)

        return replace(slot, variants=tuple(replace(variant, price=price(variant)) for variant in slot.variants))

    def excess(self, one: int, other: int) -> float:
        """Return by how much more two slots lose together than each alone."""
        return self.pairs[one, other] - self.gone[one] - self.gone[other]

    def loss(self, corrected: Sequence[Slot], choice: Choice) -> float:
        """Estimate the loss of a choice with what pairs lose together."""
        return total_price(corrected, choice) + sum(
            self.excess(one, other)
            for one, other in self.pairs
            if _is_gone(corrected, choice, one) and _is_gone(corrected, choice, other)
        )

    def choose(self, corrected: Sequence[Slot], budget: Budget) -> Choice:
        """Find a choice of little predicted loss, pairs counted; without pairs, one of the least.

        What a slot adds as one of a pair depends on its neighbours, so the exact choice is made again and again, each
        time with the neighbours as they were; the best of these counts. Raises InputError if none meets the budget.
        """
        found = [least_loss(corrected, budget)]
        while self.pairs and len(found) < _MOST_TURNS:
            choice = least_loss(self._beside(corrected, found[-1]), budget)
            if choice in found:
                break
            found.append(choice)
        return min(found, key=lambda choice: self.loss(corrected, choice))

    def _beside(self, corrected: Sequence[Slot], choice: Choice) -> list[Slot]:
        """Return the slots with what each would lose beside those that are gone in `choice`."""
        more = [0.0] * len(corrected)
        for one, other in self.pairs:
            for number, beside in ((one, other), (other, one)):
                if _is_gone(corrected, choice, beside):
                    more[number] += self.excess(one, other)
        return [
            replace(
                slot,
                variants=tuple(
                    replace(variant, price=max(0.0, variant.price + added)) if variant.keep == 0 else variant
                    for variant in slot.variants
                ),
            )
            for slot, added in zip(corrected, more, strict=True)
        ]


def _is_gone(slots: Sequence[Slot], choice: Choice, number: int) -> bool:
    return slots[number].variants[choice[number]].keep == 0
