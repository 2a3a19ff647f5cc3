"""What each unit group may keep, at what size and what predicted loss: the problem of exact allocators, as numbers.

A slot is one unit group of one block, a variant one width of it. A choice names a variant of every slot. Its predicted
loss is the sum of the variants' prices: losses of different blocks are taken to add up.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from structprune.allocation.budget import (
    AllocationOptions,
    BlockBudget,
    allowed_removals,
    check_bounds,
    removal_costs,
    removal_target,
)
from structprune.kinds import UnitKind

Choice = tuple[int, ...]
"""Position of a variant in each slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One width of a slot."""

    keep: int
    """Units that are kept; 0: the sublayer goes."""
    cost: tuple[int, ...]
    """What it adds to each sum that is limited, in whole numbers such as parameters or bytes."""
    price: float
    """Loss that it is predicted to add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One unit group and its widths, by ascending removal."""

    block: int
    kind: UnitKind
    variants: tuple[Variant, ...]

    def scaled(self, factor: float) -> Slot:
        """Return the slot with all its predicted losses times a factor."""
        return replace(self, variants=tuple(replace(one, price=one.price * factor) for one in self.variants))

    @property
    def undominated(self) -> list[int]:
        """Positions of the variants with a use, ascending: no smaller one has a lower price. Their prices ascend."""
        found, lowest = list[int](), math.inf
        for place, variant in reversed(list(enumerate(self.variants))):
            if variant.price <= lowest:
                lowest = variant.price
                found.append(place)
        return found[::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that a choice may add to each sum."""

    at_most: tuple[int, ...]

    def met(self, slots: Sequence[Slot], choice: Choice) -> bool:
        """Say whether no sum is larger than it may be."""
        return all(total <= most for total, most in zip(total_cost(slots, choice), self.at_most, strict=True))


def total_cost(slots: Sequence[Slot], choice: Choice) -> tuple[int, ...]:
    """Add up what the chosen variants add to each sum."""
    costs = [slot.variants[place].cost for slot, place in zip(slots, choice, strict=True)]
    return tuple(sum(column) for column in zip(*costs, strict=True))


def total_price(slots: Sequence[Slot], choice: Choice) -> float:
    """Add up the predicted losses of the chosen variants."""
    return sum(slot.variants[place].price for slot, place in zip(slots, choice, strict=True))


def kept_units(slots: Sequence[Slot], choice: Choice) -> list[int]:
    """Return the units that each slot keeps."""
    return [slot.variants[place].keep for slot, place in zip(slots, choice, strict=True)]


def make_menu(budgets: Sequence[BlockBudget], options: AllocationOptions) -> tuple[list[Slot], Budget]:
    """List the widths that every group may have with their predicted losses, and what all together may add.

    Raises InputError as `check_bounds`, and NumericalError if a loss is not finite.
    """
    check_bounds(budgets, options)
    removals = (removal_target(budgets, options), *options.further)
    dense = (sum(b.sizes[number].kept(b.num_units) for b in budgets) for number in range(len(removals)))
    at_most = tuple(size - removal for size, removal in zip(dense, removals, strict=True))
    return list_slots(budgets, options), Budget(at_most=at_most)


def list_slots(budgets: Sequence[BlockBudget], options: AllocationOptions) -> list[Slot]:
    """List the widths that every group may have; a price is the sum of the losses of the removals that lead to it.

    Raises NumericalError if a loss is not finite.
    """
    slots: list[Slot] = []
    for budget in budgets:
        prices = [0.0, *torch.cumsum(removal_costs(budget), dim=0).tolist()]
        variants: list[Variant] = []
        for removed in allowed_removals(budget, options):
            keep = budget.num_units - removed
            cost = tuple(sizes.kept(keep) for sizes in budget.sizes)
            variants.append(Variant(keep=keep, cost=cost, price=prices[removed]))
        slots.append(Slot(block=budget.block, kind=budget.kind, variants=tuple(variants)))
    return slots


def filled(slots: Sequence[Slot], choice: Choice, budget: Budget) -> Choice:
    """Take back removals that the budget does not need, one step of one slot at a time, the dearest step first.

    No slot can keep a step more afterwards. Ties go to the earlier slot. `choice` meets the budget.
    """
    chosen, useful = list(choice), [slot.undominated for slot in slots]
    while True:
        total = total_cost(slots, tuple(chosen))
        saved, number, place = 0.0, -1, -1
        for slot_number, (slot, places) in enumerate(zip(slots, useful, strict=True)):
            now = slot.variants[chosen[slot_number]]
            rank = bisect.bisect_left(places, chosen[slot_number])
            if rank == 0:
                continue
            larger = places[rank - 1]
            cost = zip(total, now.cost, slot.variants[larger].cost, budget.at_most, strict=True)
            fits = all(sum_ - old + new <= most for sum_, old, new, most in cost)
            if fits and (number < 0 or now.price - slot.variants[larger].price > saved):
                saved, number, place = now.price - slot.variants[larger].price, slot_number, larger
        if number < 0:
            return tuple(chosen)
        chosen[number] = place
