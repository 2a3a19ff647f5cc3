"""The ranking by measured errors: units go where the outputs feel it least, for what they cost."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import structprune
from structprune import ModuleRecipe, prune_module
from structprune.errors import InputError, UnsupportedError
from structprune.modules.costs import MACS, PARAMETERS
from structprune.modules.layout import as_example
from structprune.modules.sensitivity import convex_rises, measured_per_cost

NEURONS = 24


class Branches(nn.Module):
    """Two equal maps of each position, of which one hardly counts, and a map of the mean, which costs little."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet, self.head = (
            nn.Sequential(nn.Linear(6, NEURONS), nn.GELU(), nn.Linear(NEURONS, 6)) for _ in range(3)
        )
        for one, other in zip(self.loud.parameters(), self.quiet.parameters(), strict=True):
            other.data.copy_(one)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.loud(x) + 0.01 * self.quiet(x)).mean(1))


@pytest.fixture
def given() -> list[Tensor]:
    return [torch.randn(4, 20, 6) for _ in range(12)]


@pytest.fixture
def model() -> Branches:
    torch.manual_seed(0)
    return Branches().eval().requires_grad_(False)


def widths(result: structprune.PrunedModule) -> dict[str, int]:
    return {name.partition(".")[0]: after for name, (before, after) in result.widths.items() if before == NEURONS}


def test_units_go_where_it_is_felt_least(model: Branches, given: list[Tensor]) -> None:
    """The weights of both branches are equal: scores of families cannot tell them apart, errors of the output can."""
    recipe = ModuleRecipe(sparsity=0.3, cost="macs", repair=False, families=lambda family: family.num_units == NEURONS)
    found = {
        ranking: prune_module(model, given, replace(recipe, ranking=ranking)) for ranking in ("measured", "global")
    }
    assert widths(found["measured"])["quiet"] < 12 < widths(found["measured"])["loud"]
    assert abs(widths(found["global"])["quiet"] - widths(found["global"])["loud"]) <= 1
    # The map of the mean saves a twentieth as much: its units stay.
    assert widths(found["measured"])["head"] == 24
    wanted = [model(each) for each in given]
    errors = {
        name: sum(float((result.module(each) - y).square().sum()) for each, y in zip(given, wanted, strict=True))
        for name, result in found.items()
    }
    assert errors["measured"] < 0.2 * errors["global"]


def test_protected_families_stay_whole(model: Branches, given: list[Tensor]) -> None:
    result = prune_module(model, given, ModuleRecipe(sparsity=0.2, protect=("quiet.*", "head.0"), repair=False))
    assert widths(result)["loud"] < NEURONS == widths(result)["quiet"] == widths(result)["head"]
    with pytest.raises(InputError, match=r"no family has such a name; got loud, wanted loud\.0"):
        prune_module(model, given, ModuleRecipe(sparsity=0.2, protect=("head*", "loud")))
    with pytest.raises(UnsupportedError, match=r"held by .*protect"):
        prune_module(model, given, ModuleRecipe(sparsity=0.2, protect=("*",)))


def test_numbers_areconvex_rises_of_the_error_over_what_a_unit_costs(model: Branches, given: list[Tensor]) -> None:
    """Of each family alone: the sum up to the last trial is the error there, and the order is that of the scores."""
    layout = structprune.layout(model, given[0])
    families = [each for each in layout.families if each.num_units == NEURONS]
    scores = {each.name: torch.randn(NEURONS, dtype=torch.float64) for each in families}
    cost = PARAMETERS.of(layout)
    found = measured_per_cost(layout, scores, cost, [as_example(each) for each in given[:3]], 0.5)
    for family in families:
        numbers_U, order_U = found[family.name], scores[family.name].argsort()
        assert numbers_U[order_U][:12].isfinite().all()
        assert numbers_U[order_U][12:].isinf().all()
        assert (numbers_U[order_U][:12].diff() > 0).all()
        smaller = structprune.compact(model, {family.name: sorted(order_U[12:].tolist())}, given[0])
        error = sum(float((smaller(x) - model(x)).square().sum() / model(x).square().sum()) for x in given[:3])
        saved = cost({}) - cost({family.atom: NEURONS - 1})
        assert float(numbers_U[order_U][:12].sum()) * saved == pytest.approx(error, rel=1e-4)
    # What costs nothing leaves last.
    nothing = measured_per_cost(layout, scores, lambda _: 1, [as_example(given[0])], 0.5)
    assert all(each.isinf().all() for each in nothing.values())
    assert MACS.of(layout)({}) > 0


def testconvex_rises_are_the_largest_convex_curve_below_the_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        numbers = [0, *(torch.randperm(30, generator=generator)[:6] + 1).sort().values.tolist()]
        errors = [0.0, *torch.rand(6, generator=generator, dtype=torch.float64).cumsum(0).tolist()]
        curve = [0.0, *itertools.accumulate(convex_rises(numbers, errors))]
        assert all(second > first for first, second in itertools.pairwise(convex_rises(numbers, errors)))
        for number in numbers:
            # Below each point the curve is the lowest of all chords over it.
            chords = [
                errors[a] + (errors[b] - errors[a]) * (number - numbers[a]) / (numbers[b] - numbers[a])
                for a, b in itertools.combinations(range(7), 2)
                if numbers[a] <= number <= numbers[b]
            ]
            assert curve[number] == pytest.approx(min(chords), abs=1e-6)
