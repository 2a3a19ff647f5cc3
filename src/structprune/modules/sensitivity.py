"""What a family of units is worth, measured: the error of the outputs without its least important units, over what they
cost.

One ranking for all units needs numbers that mean the same everywhere, and norms or gradients of single families do not.
NetAdapt (arXiv 1804.03230) and sensitivity curves before it measure whole layers instead; knapsacks of importance over
cost (HALP, arXiv 2110.10811) say what to do with the numbers. This is a simple form of both, worked out here: errors of
families are taken as additive, and their curves as convex.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf

import torch
from torch import Tensor

from structprune.modules.costs import Counts
from structprune.modules.layout import ModuleLayout
from structprune.modules.outputs import OutputError
from structprune.tracing.replay import Example

_SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Shares of what a family may lose that are tried."""
_EXAMPLES = 8
"""Examples that are run for each trial, spread over those that are given."""
_TIE = 1e-9
"""Units of one trial have the same number; they keep their order by this much a unit."""


def measured_per_cost(
    layout: ModuleLayout,
    scores: Mapping[str, Tensor],
    cost: Callable[[Counts], int],
    examples: Sequence[Example],
    max_share: float,
) -> dict[str, Tensor]:
    """Put the error that a unit's removal adds, by what it costs, in the place of each unit's score, (U,) in float64.

    A family's units keep their order. It is run without its least ones, a growing number of them at a time, and the
    rise of the error along the convex hull of these trials is shared out to the units in between. Units that save
    nothing, and those of no trial, have an infinite number: they leave last.
    """
    state = {name: tensor.detach() for name, tensor in layout.state.items()}
    error = OutputError(layout, state, examples[:: -(-len(examples) // _EXAMPLES)])
    found: dict[str, Tensor] = {}
    for name, scores_U in scores.items():
        family, size = layout.family(name), len(scores_U)
        order_U = scores_U.argsort(stable=True)
        saved = cost({}) - cost({family.atom: size - 1})
        most = min(int(max_share * size), size - 1)
        found[name] = torch.full((size,), inf, dtype=torch.float64)
        if saved <= 0 or most < 1:
            continue
        numbers = sorted({max(int(share * most), 1) for share in _SHARES})
        errors = [error.without(state, {family.atom: sorted(order_U[number:].tolist())}) for number in numbers]
        rises = convex_rises([0, *numbers], [0.0, *errors])
        found[name][order_U[:most]] = torch.tensor(rises, dtype=torch.float64) / saved
    return found


def convex_rises(numbers: Sequence[int], errors: Sequence[float]) -> list[float]:
    """Return how much each removal adds, by the convex hull below points (number removed, error)."""
    rises: list[float] = []
    at = 0
    while at < len(numbers) - 1:
        slopes = {
            place: (errors[place] - errors[at]) / (numbers[place] - numbers[at])
            for place in range(at + 1, len(numbers))
        }
        following = min(slopes, key=lambda place: (slopes[place], -place))
        slope = max(slopes[following], torch.finfo(torch.float64).tiny)
        rises += [slope * (1 + _TIE * number) for number in range(numbers[at], numbers[following])]
        at = following
    return rises
