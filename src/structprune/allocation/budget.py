"""What an allocator sees: counts and costs of unit groups, never a matrix; and the rounding that all of them share."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from structprune.errors import InputError, NumericalError
from structprune.kinds import UnitKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a unit group adds to a sum over the model that is limited, such as its parameters."""

    unit: int
    """What each unit that is kept adds; on average, where there is a table."""
    rest: int = 0
    """What else the group adds, which goes when the last unit does."""
    table: tuple[tuple[int, int], ...] = ()
    """(units, what the group adds when it keeps them), ascending from no unit to all: such as times, which do not grow
    evenly. Between two entries the sum grows evenly. Without entries it does everywhere."""

    def kept(self, num_keep: int) -> int:
        """Return what the group adds when it keeps so many units."""
        if not self.table:
            return num_keep * self.unit + (self.rest if num_keep else 0)
        place = max(1, bisect.bisect_left(self.table, num_keep, key=lambda entry: entry[0]))
        (fewer, less), (more, most) = self.table[place - 1 : place + 1]
        return less + (most - less) * (num_keep - fewer) // (more - fewer)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBudget:
    """One unit group of one block."""

    block: int
    kind: UnitKind
    num_units: int
    unit_size: int
    """What a unit adds to the sum that is limited: its parameters, or where bytes are limited those."""
    module_size: int
    """The same of the module that holds the group; the sparsity's denominator."""
    rest_size: int = 0
    """What goes beside the units when the last of them goes."""
    size_table: tuple[tuple[int, int], ...] = ()
    """What the group adds at some widths, where that does not grow evenly (`Sizes.table`)."""
    further: tuple[Sizes, ...] = ()
    """What the group adds to each further sum that is limited, in the order of `AllocationOptions.further`."""
    multiple_of: int = 1
    """Kept units are a multiple of this."""
    cost_U: Tensor | None = None
    """Loss that the removal of the first, second, ... unit adds, in the order in which the block would lose them."""

    @property
    def sizes(self) -> tuple[Sizes, ...]:
        """What the group adds to every sum that is limited."""
        return (Sizes(unit=self.unit_size, rest=self.rest_size, table=self.size_table), *self.further)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationOptions:
    """Settings that all allocators share, and the temperature of those that have one."""

    sparsity: float
    """Share of the sum over the groups' modules to remove."""
    removal: int | None = None
    """How much of that sum is to be removed, where it is not said by the share."""
    further: tuple[int, ...] = ()
    """How much of each further sum is to be removed; only allocators that hold several sums are given any."""
    min_retention: float = 0.1
    """No group keeps a smaller share of its units; not in force where groups may go."""
    max_retention: float = 1.0
    """No group keeps a larger share of its units, but for the protected ones."""
    allow_removal: bool = False
    """A group may lose all of its units. `uniform` does not make use of it."""
    protected: frozenset[int] = frozenset()
    """Blocks that lose nothing."""
    temperature: float = 0.0
    widths: Mapping[int, Mapping[UnitKind, int]] = field(default_factory=dict)
    """Block -> kind -> units to keep, for an allocator that reads them."""


def asked_removal(budgets: Sequence[BlockBudget], options: AllocationOptions) -> float:
    """Return how much is to be removed of all groups together; a share of them need not be a whole number."""
    return options.sparsity * sum(b.module_size for b in budgets) if options.removal is None else options.removal


def removal_target(budgets: Sequence[BlockBudget], options: AllocationOptions) -> int:
    """Return how much is to be removed of all groups together, such as the number of parameters."""
    return math.ceil(asked_removal(budgets, options) - 1e-6)


def removal_costs(budget: BlockBudget) -> Tensor:
    """Return the loss that each removal adds, float64. Raises NumericalError if one is not finite."""
    assert budget.cost_U is not None, "this allocator needs the loss of each removal"
    if not torch.isfinite(budget.cost_U).all():
        raise NumericalError(
            "a removal cost is not finite", where=f"block {budget.block} {budget.kind}", do="raise --damping"
        )
    return budget.cost_U.to(torch.float64)


def largest_removal(budget: BlockBudget, options: AllocationOptions) -> int:
    """Return the most units that a group may lose if its remaining width is to be a multiple."""
    if budget.block in options.protected:
        return 0
    if options.allow_removal:
        return budget.num_units
    least = max(1, math.ceil(options.min_retention * budget.num_units))
    least = -(-least // budget.multiple_of) * budget.multiple_of
    return max(0, budget.num_units - least)


def smallest_removal(budget: BlockBudget, options: AllocationOptions) -> int:
    """Return the fewest units that a group must lose if its remaining width is to be a multiple."""
    if budget.block in options.protected or options.max_retention >= 1:
        return 0
    # The epsilon keeps 0.9 * 10 from becoming 8 units through binary rounding.
    most = math.floor(options.max_retention * budget.num_units + 1e-9)
    return min(budget.num_units - most // budget.multiple_of * budget.multiple_of, largest_removal(budget, options))


def bounded(removal: float, budget: BlockBudget, options: AllocationOptions) -> float:
    """Clamp `removal` to what the group may lose."""
    low, high = smallest_removal(budget, options), largest_removal(budget, options)
    return min(max(removal, float(low)), float(high))


def check_bounds(budgets: Sequence[BlockBudget], options: AllocationOptions) -> None:
    """Raise InputError if the groups must lose more than is asked for, or cannot lose as much."""
    total, target = sum(budget.module_size for budget in budgets), removal_target(budgets, options)
    removals = [(budget, allowed_removals(budget, options)) for budget in budgets]
    least, most = (sum(_removed(budget, allowed[end]) for budget, allowed in removals) for end in (0, -1))
    # What the widest steps leave beyond the target is rounding; more than a step of each group is not.
    if least - sum(b.multiple_of * b.unit_size for b in budgets) >= target and options.max_retention < 1:
        raise InputError(
            "--max-retention takes more than the sparsity asks for",
            got=f"--max-retention {options.max_retention:g}, sparsity {options.sparsity:g}",
            wanted=f"a sparsity of at least {least / total:.4f}",
            do="raise --max-retention or --sparsity",
        )
    if most < target:
        raise InputError(
            "the sparsity cannot be reached within the groups' bounds",
            got=f"sparsity {options.sparsity:g}, {_bounds(options)}",
            wanted=f"at most {most / total:.4f}",
            do="lower --sparsity" if options.allow_removal else "lower --sparsity, --min-retention or --multiple-of",
        )


def round_to_budget(budgets: Sequence[BlockBudget], wanted: Sequence[float], options: AllocationOptions) -> list[int]:
    """Round real-valued removals to units to keep, in multiples, so that at least the target is removed.

    Each group is rounded down to a step it can take; the steps that are still missing go to the groups that lost most
    by rounding (largest remainder; ties to the earlier group). The surplus is less than one step of one group. A
    group that loses nothing keeps its dense width even if that is no multiple. Raises InputError as `check_bounds`.
    """
    check_bounds(budgets, options)
    steps = [allowed_removals(budget, options) for budget in budgets]
    positions: list[int] = []
    for allowed, value in zip(steps, wanted, strict=True):
        positions.append(max(i for i, removal in enumerate(allowed) if i == 0 or removal <= value + 1e-9))
    target = removal_target(budgets, options)
    removed = sum(s[p] * b.unit_size for s, p, b in zip(steps, positions, budgets, strict=True))
    while removed < target:
        open_groups = [i for i, (s, p) in enumerate(zip(steps, positions, strict=True)) if p + 1 < len(s)]
        best = max(open_groups, key=lambda i: ((wanted[i] - steps[i][positions[i]]) / _first_step(budgets[i]), -i))
        removed += (steps[best][positions[best] + 1] - steps[best][positions[best]]) * budgets[best].unit_size
        positions[best] += 1
    return [b.num_units - s[p] for b, s, p in zip(budgets, steps, positions, strict=True)]


def _removed(budget: BlockBudget, count: int) -> int:
    """Return what leaves the sum with so many units alone."""
    if not budget.size_table:
        return count * budget.unit_size
    return budget.sizes[0].kept(budget.num_units) - budget.sizes[0].kept(budget.num_units - count)


def _bounds(options: AllocationOptions) -> str:
    if options.allow_removal:
        return "whole groups may go, but for the biases that belong to no unit and the protected blocks"
    return f"at least {options.min_retention:g} of each group kept"


def allowed_removals(budget: BlockBudget, options: AllocationOptions) -> list[int]:
    """List the removals that leave a multiple, ascending, from the smallest; zero is one whatever the dense width."""
    smallest, largest = smallest_removal(budget, options), largest_removal(budget, options)
    steps = [0, *range(_first_step(budget), largest + 1, budget.multiple_of)]
    return [step for step in steps if step >= smallest]


def _first_step(budget: BlockBudget) -> int:
    """Return the smallest removal that leaves a multiple."""
    return budget.num_units % budget.multiple_of or budget.multiple_of
