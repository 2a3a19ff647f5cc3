"""Allocation across blocks from the loss that each removal adds: threshold, Fermi-Dirac and softmax forms.

Notation as in docs/methods/structprune.md: s_lj the loss added by removal j of group l, c_l its size, r_l the
removed share of group l.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from structprune.allocation.allocator import Allocator
from structprune.allocation.budget import (
    AllocationOptions,
    BlockBudget,
    allowed_removals,
    bounded,
    check_bounds,
    removal_costs,
    removal_target,
    round_to_budget,
    round_to_steps,
)

_TINY = 1e-300


def closed_form(budgets: Sequence[BlockBudget], options: AllocationOptions) -> list[int]:
    """Remove unit j of group l iff s_lj / c_l <= lambda: one Lagrangian threshold for all groups and kinds.

    min sum of s over removed units subject to the parameter budget; the Lagrangian separates (derived, method note
    3a). s is made non-decreasing along each group's removal order first (pooled adjacent violators), so that what a
    threshold selects is a prefix of that order.
    """
    return _threshold(budgets, [increasing(removal_costs(b)) / b.unit_size for b in budgets], options)


def standardised(budgets: Sequence[BlockBudget], options: AllocationOptions) -> list[int]:
    """Apply one threshold to the scores after those of each group are brought to mean zero and deviation one.

    Parameters only count toward the budget (FLAP, arXiv 2312.11983, as its public code has it). A group of equal scores
    is all zeros.
    """

    def standard(cost_U: Tensor) -> Tensor:
        deviation = cost_U.std(correction=0)
        return (cost_U - cost_U.mean()) / deviation if deviation > 0 else torch.zeros_like(cost_U)

    return _threshold(budgets, [standard(increasing(removal_costs(b))) for b in budgets], options)


def fermi_dirac(budgets: Sequence[BlockBudget], options: AllocationOptions) -> list[int]:
    """Remove the Fermi-Dirac share r_l = mean_j sigmoid((mu - eps_lj) / T) of each group; mu meets the budget.

    eps_lj = ln(s_lj / c_l), standardised (derived, note 3b). T -> 0 is `closed_form`, T -> infinity is uniform.
    """
    if options.temperature <= 0:
        return closed_form(budgets, options)
    energies = [(increasing(removal_costs(b)) / b.unit_size).clamp_min(_TINY).log() for b in budgets]
    pooled = torch.cat(energies)
    energies = [(e - pooled.mean()) / pooled.std().clamp_min(1e-12) for e in energies]

    def removals(mu: float) -> list[float]:
        return [
            bounded(b.num_units * float(torch.sigmoid((mu - e) / options.temperature).mean()), b, options)
            for b, e in zip(budgets, energies, strict=True)
        ]

    reach = 60.0 * max(1.0, options.temperature) + 60.0
    mu = bisected(lambda x: _size(budgets, removals(x)), removal_target(budgets, options), -reach, reach)
    return round_to_budget(budgets, removals(mu), options)


def softmax(budgets: Sequence[BlockBudget], options: AllocationOptions) -> list[int]:
    """Keep the share q_l = clip(kappa exp(I_l / T), q_min, 1) of each group; kappa meets the budget.

    I_l is the standardised log of the group's total loss per parameter (derived, note 3c, nearest to the paper's
    abstract). T <= 0 is read as 1.
    """
    temperature = options.temperature if options.temperature > 0 else 1.0
    importance = torch.tensor(
        [float(removal_costs(b).sum().clamp_min(_TINY).log()) - torch.tensor(b.module_size).log() for b in budgets]
    )
    importance = (
        (importance - importance.mean()) / importance.std().clamp_min(1e-12) if len(budgets) > 1 else importance * 0
    )

    def removals(log_kappa: float) -> list[float]:
        kept = (log_kappa + importance / temperature).exp().clamp(max=1.0)
        return [bounded(b.num_units * (1.0 - float(q)), b, options) for b, q in zip(budgets, kept, strict=True)]

    reach = 60.0 + float(importance.abs().max()) / temperature
    # More kappa keeps more: bisect on its negative, so that removals rise.
    found = bisected(lambda x: _size(budgets, removals(-x)), removal_target(budgets, options), -reach, reach)
    return round_to_budget(budgets, removals(-found), options)


def _threshold(budgets: Sequence[BlockBudget], costs: list[Tensor], options: AllocationOptions) -> list[int]:
    """Return the units to keep when all removals that cost at most lambda are made; costs ascend within a group."""
    check_bounds(budgets, options)
    steps = [allowed_removals(budget, options) for budget in budgets]
    return threshold(budgets, costs, steps, removal_target(budgets, options))


def threshold(
    budgets: Sequence[BlockBudget], costs: Sequence[Tensor], steps: Sequence[Sequence[int]], target: int
) -> list[int]:
    """Return the units to keep when all removals up to one cost are made, of so many as `steps` allow each group.

    Costs ascend within a group; the steps reach the target.
    """

    def removals(most: float) -> list[float]:
        return [
            min(max(float(torch.searchsorted(p, most, right=True)), float(s[0])), float(s[-1]))
            for p, s in zip(costs, steps, strict=True)
        ]

    # Bisection over the costs that occur; units of the cost at the threshold go only as far as the target asks.
    levels = [-math.inf, *torch.cat(list(costs)).unique().tolist()]
    reached = bisect.bisect_left(levels, target, key=lambda x: _size(budgets, removals(x)))
    beyond = removals(levels[min(reached, len(levels) - 1)])
    below = removals(levels[max(0, reached - 1)])
    extra = _size(budgets, beyond) - _size(budgets, below)
    share = min(1.0, (target - _size(budgets, below)) / extra) if extra > 0 else 0.0
    return round_to_steps(budgets, [b + share * (a - b) for a, b in zip(beyond, below, strict=True)], steps, target)


def increasing(cost_U: Tensor) -> Tensor:
    """Return the nearest non-decreasing sequence (pool adjacent violators); the sum over a whole pool is unchanged."""
    values: list[float] = []
    counts: list[int] = []
    for value in cost_U.tolist():
        values.append(value)
        counts.append(1)
        while len(values) > 1 and values[-2] > values[-1]:
            total = counts[-2] + counts[-1]
            values[-2] = (values[-2] * counts[-2] + values[-1] * counts[-1]) / total
            counts[-2] = total
            values.pop()
            counts.pop()
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(counts))


def _size(budgets: Sequence[BlockBudget], removals: Sequence[float]) -> float:
    return sum(r * b.unit_size for r, b in zip(removals, budgets, strict=True))


def bisected(removed: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Find the largest x at which the non-decreasing `removed` is at most `target`; `high` if it never exceeds it."""
    if removed(high) <= target:
        return high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if removed(middle) > target:
            high = middle
        else:
            low = middle
    return low


CLOSED_FORM = Allocator(allocate=closed_form, compares="loss")
FERMI_DIRAC = Allocator(allocate=fermi_dirac, compares="loss", has_temperature=True)
SOFTMAX = Allocator(allocate=softmax, compares="loss", has_temperature=True)
STANDARDISED = Allocator(allocate=standardised, compares="scores")
