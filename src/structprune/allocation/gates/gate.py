"""What a learner of gates is given, and what it does; the choice that every learner's scores end in.

A gate is a number in front of a unit's share of the consumer's input: 1 where the unit is there, 0 where it is gone.
Units are numbered through all sublayers in scope, and within one in the order in which it would lose them, so the
first ones of each are gone at the start. A score says how long a unit stays: those with the lowest go.

Shape suffixes: U units of all sublayers in scope, one sublayer after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from structprune.allocation.across import increasing, threshold
from structprune.allocation.budget import (
    AllocationOptions,
    BlockBudget,
    allowed_removals,
    removal_costs,
    removal_target,
)

# Share of the units that may change sides: those nearest to where the start has its threshold.
_BAND_SHARE = 0.3
_TINY = 1e-300
# Of two units with one price the earlier one in the order of removal goes first; far below any difference that counts.
_TIE = 1e-9
# A unit that cannot change lies this far out, the band's units between -1 and 1.
_OUTSIDE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GateProblem:
    """Which units may change sides, where all of them are at the start, and what every choice has to meet."""

    budgets: tuple[BlockBudget, ...]
    """The sublayers."""
    steps: tuple[tuple[int, ...], ...]
    """Removals that each may have, ascending: among them the start's."""
    target: int
    """What all removals together have to take, such as parameters."""
    start_U: Tensor
    """Scores at the start, float64: the logarithm of a removal's price per parameter, so scaled and moved that the
    units that may change lie between -1 and 1, and the threshold at 0."""
    free_U: Tensor
    """Whether a unit may change sides."""
    stays_U: Tensor
    """Whether a unit stays at the start."""
    num_steps: int
    """Steps that there will be."""
    seed: int = 0

    @property
    def size_U(self) -> Tensor:
        """What each unit counts toward the target, float64."""
        return torch.cat([torch.full((b.num_units,), float(b.unit_size), dtype=torch.float64) for b in self.budgets])

    def parts(self, value_U: Tensor) -> tuple[Tensor, ...]:
        """Split one number per unit into those of each sublayer."""
        return value_U.split([budget.num_units for budget in self.budgets])

    def bounded(self, score_U: Tensor) -> Tensor:
        """Hold scores of units that may change between -1 and 1; the others keep those of the start."""
        return torch.where(self.free_U, score_U.clamp(-1.0, 1.0), self.start_U)

    def keep(self, score_U: Tensor) -> Tensor:
        """Choose the units that stay (U,): by one threshold for all, each sublayer's removals being one of its steps.

        At least the target goes, and less than one step of one sublayer more than that. Units that may not change are
        never chosen anew: no sublayer has a step that would take them.
        """
        parts = self.parts(self.bounded(score_U))
        sorted_parts = [part.sort(stable=True) for part in parts]
        kept = threshold(self.budgets, [part.values for part in sorted_parts], self.steps, self.target)
        masks: list[Tensor] = []
        for part, count in zip(sorted_parts, kept, strict=True):
            mask = torch.ones(len(part.indices), dtype=torch.bool)
            mask[part.indices[: len(part.indices) - count]] = False
            masks.append(mask)
        return torch.cat(masks)

    def net(self, gradient_U: Tensor) -> Tensor:
        """Take the budget's price from the derivative of the loss by every gate; 0 where a unit may not change sides.

        The price per parameter is the one at which, of the units that may change, as much would stay as at the start
        if their derivatives alone decided. All gates that are opened lower the loss; what is left here tells those that
        are worth their parameters (below zero) from the others, which is what an optimiser wants that steps by signs.
        Where every sublayer keeps its width, each has a price of its own.
        """
        owns = len(self.budgets) if all(len(step) == 1 for step in self.steps) else 1
        group_U = torch.cat([torch.full((b.num_units,), i % owns) for i, b in enumerate(self.budgets)])
        result_U = torch.zeros_like(gradient_U)
        for number in range(owns):
            here_U = self.free_U & (group_U == number)
            size_F, value_F = self.size_U[here_U], -gradient_U[here_U] / self.size_U[here_U]
            order_F = value_F.argsort(descending=True, stable=True)
            stays = float(self.size_U[here_U & self.stays_U].sum())
            count = int((size_F[order_F].cumsum(0) <= stays).sum())
            if 0 < count < len(order_F):
                price = float(value_F[order_F[count - 1]] + value_F[order_F[count]]) / 2
                result_U[here_U] = (price - value_F) * size_F
        return result_U


def gate_problem(
    budgets: Sequence[BlockBudget],
    options: AllocationOptions,
    kept: Sequence[int],
    *,
    keeps_widths: bool,
    num_steps: int,
    seed: int,
) -> GateProblem:
    """Make the problem around a choice of widths: `kept` units of each sublayer, by its costs in order of removal.

    With `keeps_widths` only which units stay is learned. Raises NumericalError if a cost is not finite.
    """
    prices = [_log_prices(budget) for budget in budgets]
    gone = [budget.num_units - keep for budget, keep in zip(budgets, kept, strict=True)]
    parts = _centred(prices, gone)
    movable = [0 < count < budget.num_units for budget, count in zip(budgets, gone, strict=True)]
    near = [part.abs() for part, can in zip(parts, movable, strict=True) if can]
    width = float(torch.cat(near).quantile(_BAND_SHARE)) if near else 1.0
    scores, free, stays, steps = list[Tensor](), list[Tensor](), list[Tensor](), list[tuple[int, ...]]()
    for budget, part, count, can in zip(budgets, parts, gone, movable, strict=True):
        inside_U = part.abs() <= width if can else torch.zeros(budget.num_units, dtype=torch.bool)
        stays.append(torch.arange(budget.num_units) >= count)
        side_U = torch.where(stays[-1], _OUTSIDE, -_OUTSIDE).double()
        scores.append(torch.where(inside_U, part / max(width, _TINY), side_U))
        free.append(inside_U)
        low = int((~inside_U[:count]).sum())
        reach = range(low, low + int(inside_U.sum()) + 1)
        allowed = () if keeps_widths else allowed_removals(budget, options)
        steps.append(tuple(sorted({count, *(r for r in allowed if r in reach and r < budget.num_units)})))
    return GateProblem(
        budgets=tuple(budgets),
        steps=tuple(steps),
        target=removal_target(budgets, options),
        start_U=torch.cat(scores),
        free_U=torch.cat(free),
        stays_U=torch.cat(stays),
        num_steps=num_steps,
        seed=seed,
    )


def _log_prices(budget: BlockBudget) -> Tensor:
    """Compute the logarithm of each removal's price per parameter; it rises in the order of removal."""
    log_U = (increasing(removal_costs(budget)) / budget.unit_size).clamp_min(_TINY).log()
    return log_U + _TIE * torch.arange(budget.num_units)


def _centred(prices: Sequence[Tensor], gone: Sequence[int]) -> list[Tensor]:
    """Move each sublayer's prices so that zero lies between what goes and what stays.

    One that loses all or nothing is moved as the middle one of the others.
    """
    places = [
        float(price[count - 1] + price[count]) / 2 if 0 < count < len(price) else None
        for price, count in zip(prices, gone, strict=True)
    ]
    known = sorted(place for place in places if place is not None)
    middle = known[len(known) // 2] if known else 0.0
    return [price - (middle if place is None else place) for price, place in zip(prices, places, strict=True)]


class GateLearner(Protocol):
    """Scores of all units that learn."""

    state: dict[str, Tensor]
    """All that changes, for a run that goes on."""

    def masks(self) -> Sequence[Tensor]:
        """Return the gates (U,) that the next step runs the model with: one set, or several to be compared."""
        ...

    def step(self, gradient_U: Tensor | None, losses: Sequence[float], share: float) -> None:
        """Learn from the loss of each set, and its derivative by the gates of the only one where that is wanted.

        `share` is the part of its learning rate that this step has.
        """
        ...

    def keep(self) -> Tensor:
        """Choose the units that stay (U,)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """One way to learn which units stay."""

    start: Callable[[GateProblem], GateLearner]
    paper: str
    """Where it was published, and how much of that could be read, in words."""
    uses_gradient: bool = True
    """Whether a step needs the derivative by the gates: forward and backward, else forward alone."""
    num_sets: int = 1
    """Sets of gates that a step compares."""
    keeps_widths: bool = False
    """Whether every sublayer keeps as many units as at the start."""


def adam_direction(
    state: dict[str, Tensor], gradient_U: Tensor, betas: tuple[float, float], epsilon: float = 1e-8
) -> Tensor:
    """Return Adam's direction, and keep its moments in `state`, where they are made at the first call."""
    zeros = torch.zeros_like(gradient_U)
    first, second = state.get("first", zeros), state.get("second", zeros)
    number = state.get("number", torch.zeros((), dtype=torch.float64)) + 1
    first = betas[0] * first + (1 - betas[0]) * gradient_U
    second = betas[1] * second + (1 - betas[1]) * gradient_U.square()
    state |= {"first": first, "second": second, "number": number}
    corrected = first / (1 - betas[0] ** float(number))
    return corrected / ((second / (1 - betas[1] ** float(number))).sqrt() + epsilon)


def learning_rate(published: float, num_steps: int) -> float:
    """Return the published rate, or with few steps one by which a score can cross the band."""
    # The band is 2 wide; a cosine from the full rate to nothing is half of it on average, and steps shrink near an end.
    return max(published, 6 / max(1, num_steps))
