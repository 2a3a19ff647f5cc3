"""The Lagrangian path: the choices that are cheapest at some price of size, from the dense model to the smallest.

At a multiplier lambda every slot alone takes the variant of least price + lambda * cost. As lambda grows from zero, one
slot after the other steps along the lower convex hull of its (removed, price) points. Each point of the path is the
best choice of its size, so one sort answers all limits at once, each to within one step (Everett, 1963). `closed_form`
is the same threshold on prices that were made convex by pooling.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from structprune.allocation.menu import Choice, Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One choice of the path."""

    slot: int
    """The slot that took a step to get here."""
    place: int
    """The variant that it stepped to."""
    cost: int
    """What the whole choice adds to the sum that is limited."""
    price: float
    """Predicted loss of the whole choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """All choices from the largest to the smallest."""

    start: Choice
    start_cost: int
    start_price: float
    points: tuple[Point, ...]

    def within(self, at_most: int) -> Choice | None:
        """Return the first choice of the path that costs no more; None where the smallest does."""
        if self.start_cost <= at_most:
            return self.start
        reached = bisect.bisect_left(self.points, -at_most, key=lambda point: -point.cost)
        if reached == len(self.points):
            return None
        chosen = list(self.start)
        for point in self.points[: reached + 1]:
            chosen[point.slot] = point.place
        return tuple(chosen)


def lagrangian_path(slots: Sequence[Slot]) -> Path:
    """Sort the hulls' steps of all slots by the loss that each unit of size costs; ties: the earlier slot first."""
    hulls = [_hull(slot) for slot in slots]
    steps: list[tuple[float, int, int]] = []
    for number, (slot, hull) in enumerate(zip(slots, hulls, strict=True)):
        for order, (before, after) in enumerate(itertools.pairwise(hull)):
            steps.append((_slope(slot, before, after), number, order + 1))
    start = tuple(hull[0] for hull in hulls)
    cost = sum(slot.variants[place].cost[0] for slot, place in zip(slots, start, strict=True))
    price = sum(slot.variants[place].price for slot, place in zip(slots, start, strict=True))
    at, points = list(start), list[Point]()
    first_cost, first_price = cost, price
    for _, number, order in sorted(steps):
        place = hulls[number][order]
        old, new = slots[number].variants[at[number]], slots[number].variants[place]
        cost, price, at[number] = cost + new.cost[0] - old.cost[0], price + new.price - old.price, place
        points.append(Point(slot=number, place=place, cost=cost, price=price))
    return Path(start=start, start_cost=first_cost, start_price=first_price, points=tuple(points))


def _slope(slot: Slot, before: int, after: int) -> float:
    """Return the loss that each unit of size costs between two variants."""
    old, new = slot.variants[before], slot.variants[after]
    return (new.price - old.price) / (old.cost[0] - new.cost[0])


def _hull(slot: Slot) -> list[int]:
    """List the variants on the lower convex hull of (removed, price): slopes ascend along them."""
    hull: list[int] = []
    for place in slot.undominated:
        while len(hull) > 1 and _slope(slot, hull[-2], hull[-1]) >= _slope(slot, hull[-1], place):
            hull.pop()
        hull.append(place)
    return hull
