"""Every allocator: removes what was asked and hardly more, keeps multiples and bounds, is monotone, refuses the rest.

Shape suffixes: U units in the order of their removal.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structprune.allocation import ALLOCATORS, AllocationOptions, BlockBudget
from structprune.errors import InputError
from structprune.kinds import UnitKind

# Allocators that weigh the blocks against each other by what their removals cost.
DECIDING = [
    name
    for name in ALLOCATORS
    if not ALLOCATORS.get(name).reads_widths and (name != "milp" or importlib.util.find_spec("scipy") is not None)
]
"""Those that hold themselves to a sparsity, and are installed."""
GLOBAL = [name for name in DECIDING if name != "uniform"]
# Of these, those to which a block's overall level of cost means something.
LEVELS = [name for name in GLOBAL if name != "standardised"]


def rising_costs(num_units: int, seed: int, scale: float = 1.0) -> Tensor:
    """Costs as greedy removal gives them: mostly rising, not quite sorted, above zero."""
    noise_U = torch.rand(num_units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * (0.01 + torch.linspace(0, 1, num_units, dtype=torch.float64).square() + 0.2 * noise_U)


def budget(num_units: int, unit_size: int = 1, bias: int = 0, **changes: Any) -> BlockBudget:
    values: dict[str, Any] = {
        "block": 0,
        "kind": "mlp",
        "num_units": num_units,
        "unit_size": unit_size,
        "module_size": num_units * unit_size + bias,
        "cost_U": rising_costs(num_units, seed=0),
        **changes,
    }
    return BlockBudget(**values)


def allocate(
    name: str, budgets: Sequence[BlockBudget], sparsity: float, multiple_of: int = 1, **changes: Any
) -> list[int]:
    budgets = [replace(b, multiple_of=multiple_of) for b in budgets]
    return ALLOCATORS.get(name).allocate(budgets, AllocationOptions(sparsity=sparsity, **changes))


def total_removed(budgets: Sequence[BlockBudget], kept: Sequence[int]) -> int:
    return sum((b.num_units - k) * b.unit_size for b, k in zip(budgets, kept, strict=True))


@st.composite
def models(draw: st.DrawFn, *, whole_multiples: bool = False) -> tuple[list[BlockBudget], int]:
    """Blocks of ten multiples or more, so that a sparsity up to 0.7 always leaves something, and the multiple."""
    multiple_of = draw(st.sampled_from([1, 2, 7, 32]))
    num_units = draw(st.integers(10, 20)) * multiple_of
    if not whole_multiples:
        num_units += draw(st.integers(0, multiple_of - 1))
    unit_size = draw(st.integers(1, 5000))
    bias = draw(st.integers(0, unit_size))
    seed = draw(st.integers(0, 1000))
    scales = draw(st.lists(st.sampled_from([1e-3, 0.5, 1.0, 40.0]), min_size=1, max_size=4))
    budgets = [
        budget(num_units, unit_size, bias, block=block, cost_U=rising_costs(num_units, seed + block, scale))
        for block, scale in enumerate(scales)
    ]
    return budgets, multiple_of


@pytest.mark.parametrize("name", DECIDING)
@settings(deadline=None, max_examples=20)
@given(
    model=models(),
    sparsity=st.floats(1e-6, 0.7),
    temperature=st.sampled_from([0.0, 0.3, 5.0]),
    allow_removal=st.booleans(),
)
def test_removes_the_asked_share_and_at_most_one_multiple_more(
    name: str, model: tuple[list[BlockBudget], int], sparsity: float, temperature: float, allow_removal: bool
) -> None:
    budgets, multiple_of = model
    kept = allocate(name, budgets, sparsity, multiple_of, temperature=temperature, allow_removal=allow_removal)
    assert len(kept) == len(budgets)
    least = 0 if allow_removal and name in GLOBAL else 1
    assert all(least <= k <= b.num_units for b, k in zip(budgets, kept, strict=True))
    assert all(k == b.num_units or k % multiple_of == 0 for b, k in zip(budgets, kept, strict=True))
    asked = sparsity * sum(b.module_size for b in budgets)
    removed = total_removed(budgets, kept)
    # One multiple of one block where the blocks share a budget, of each block where each has its own.
    steps = [multiple_of * b.unit_size for b in budgets]
    assert removed >= asked * (1 - 1e-9) - 1e-6
    assert removed < asked + (max(steps) if name in GLOBAL else sum(steps)) + 1e-6


@pytest.mark.parametrize("name", DECIDING)
@pytest.mark.parametrize("num_units", [1, 7, 48, 1537])
@pytest.mark.parametrize("multiple_of", [1, 32, 4096])
def test_sparsity_zero_keeps_everything(name: str, num_units: int, multiple_of: int) -> None:
    budgets = [budget(num_units, 96, bias=32, block=block) for block in range(3)]
    assert allocate(name, budgets, 0.0, multiple_of) == [num_units] * 3


@pytest.mark.parametrize("name", DECIDING)
@settings(deadline=None, max_examples=20)
@given(
    model=models(whole_multiples=True),
    shares=st.tuples(st.floats(0, 0.7), st.floats(0, 0.7)),
    temperature=st.sampled_from([0.0, 1.0]),
    allow_removal=st.booleans(),
)
def test_monotone_in_sparsity(
    name: str,
    model: tuple[list[BlockBudget], int],
    shares: tuple[float, float],
    temperature: float,
    allow_removal: bool,
) -> None:
    budgets, multiple_of = model
    options = {"temperature": temperature, "allow_removal": allow_removal}
    low, high = (allocate(name, budgets, s, multiple_of, **options) for s in sorted(shares))
    assert sum(low) >= sum(high)


@pytest.mark.parametrize("name", DECIDING)
def test_binary_rounding_takes_no_unit(name: str) -> None:
    """In binary 0.07 * 100 and 0.29 * 100 lie beside the whole number; the request is met exactly."""
    assert 0.07 * 100 > 7
    assert allocate(name, [budget(100)], 0.07) == [93]
    assert allocate(name, [budget(100)], 0.29) == [71]


@pytest.mark.parametrize("name", DECIDING)
@pytest.mark.parametrize(("num_units", "sparsity", "multiple_of"), [(48, 0.5, 32), (10, 0.95, 1), (1, 0.01, 1)])
def test_refuses_to_leave_nothing(name: str, num_units: int, sparsity: float, multiple_of: int) -> None:
    with pytest.raises(InputError, match=r"--sparsity.*--multiple-of"):
        allocate(name, [budget(num_units, 96)], sparsity, multiple_of)


@pytest.mark.parametrize("name", DECIDING)
def test_deterministic(name: str) -> None:
    budgets = [budget(200, 3, block=block, cost_U=rising_costs(200, block)) for block in range(3)]
    assert allocate(name, budgets, 0.4, 8, temperature=0.7) == allocate(name, budgets, 0.4, 8, temperature=0.7)


def test_uniform_treats_blocks_alike_and_each_meets_the_share() -> None:
    budgets = [budget(100, 10), budget(200, 3, bias=2, block=1)]
    assert allocate("uniform", budgets, 0.25, 8) == [72, 144]
    # A bias belongs to no unit but counts in the module: 0.25 of 602 parameters are more than 50 units of 3.
    assert allocate("uniform", budgets[1:], 0.25) == [149]


def test_uniform_takes_the_same_share_of_what_units_own() -> None:
    """Half of the attention belongs to no unit: 0.2 of all 3,000 parameters are 0.24 of the 2,500 that units own."""
    budgets = [
        budget(50, 10, kind="attention", module_size=1000),
        budget(200, 10),
        budget(50, 10, block=1, kind="attention", module_size=1000),
        budget(200, 10, block=1),
    ]
    kept = allocate("uniform", budgets, 0.2)
    assert kept == [38, 152, 38, 152]
    assert total_removed(budgets, kept) == 0.2 * 6000
    # Block 0 keeps all, so block 1 loses twice the share.
    assert allocate("uniform", budgets, 0.2, protected=frozenset({0})) == [50, 200, 26, 104]


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_block_that_costs_more_keeps_more(name: str, temperature: float) -> None:
    cheap, dear = budget(100, cost_U=rising_costs(100, 0)), budget(100, block=1, cost_U=20 * rising_costs(100, 0))
    kept = allocate(name, [cheap, dear], 0.4, temperature=temperature)
    assert kept[0] < kept[1]
    assert sum(kept) == 120
    assert allocate(name, [dear, cheap], 0.4, temperature=temperature) == kept[::-1]


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_the_unit_of_cost_does_not_matter(name: str, factor: float) -> None:
    budgets = [budget(100, block=block, cost_U=rising_costs(100, block, scale=block + 1.0)) for block in range(3)]
    scaled = [replace(b, cost_U=None if b.cost_U is None else factor * b.cost_U) for b in budgets]
    assert allocate(name, scaled, 0.4, temperature=0.5) == allocate(name, budgets, 0.4, temperature=0.5)


def test_closed_form_is_the_cheapest_choice() -> None:
    """Two blocks with rising costs: no other split of the same size costs less."""
    costs = [rising_costs(30, seed).sort().values for seed in (0, 1)]
    costs[1] *= 3
    kept = allocate(
        "closed-form", [budget(30, block=i, cost_U=c) for i, c in enumerate(costs)], 0.4, min_retention=0.01
    )
    removed = 24
    assert sum(kept) == 60 - removed

    def cost(first: int) -> float:
        return float(costs[0][:first].sum() + costs[1][: removed - first].sum())

    best = min(cost(first) for first in range(removed + 1))
    assert cost(30 - kept[0]) == pytest.approx(best, rel=1e-12)


def test_energy_runs_from_the_threshold_to_the_uniform_share() -> None:
    budgets = [budget(100, block=block, cost_U=rising_costs(100, block, scale=4.0**block)) for block in range(3)]
    cold, hot = (allocate("fermi-dirac", budgets, 0.3, temperature=t) for t in (1e-6, 1e6))
    assert max(abs(a - b) for a, b in zip(cold, allocate("closed-form", budgets, 0.3), strict=True)) <= 1
    assert hot == allocate("uniform", budgets, 0.3)


@pytest.mark.parametrize("name", GLOBAL)
def test_least_share_is_kept(name: str) -> None:
    free = budget(100, cost_U=1e-9 * rising_costs(100, 0))
    dear = budget(100, block=1)
    assert allocate(name, [free, dear], 0.4, min_retention=0.35)[0] >= 35
    with pytest.raises(InputError, match="cannot be reached within the groups' bounds"):
        allocate(name, [free, dear], 0.7, min_retention=0.35)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_no_more_than_the_largest_share_is_kept(name: str, multiple_of: int) -> None:
    free = [budget(96, block=block, cost_U=1e-9 * rising_costs(96, block)) for block in range(3)]
    dear = budget(96, block=3, cost_U=1e9 * rising_costs(96, 3))
    assert allocate(name, [*free, dear], 0.3, multiple_of, temperature=0.1)[3] > 72
    kept = allocate(name, [*free, dear], 0.3, multiple_of, temperature=0.1, max_retention=0.75)
    assert kept[3] == 72
    assert max(kept) == 72
    # The budget is still met, to within one step.
    assert 0 <= 4 * 96 * 0.7 - sum(kept) < multiple_of
    protected = allocate(
        name, [*free, dear], 0.3, multiple_of, temperature=0.1, max_retention=0.75, protected=frozenset({3})
    )
    assert protected[3] == 96
    with pytest.raises(InputError, match="--max-retention takes more than the sparsity asks for"):
        allocate(name, [*free, dear], 0.1, multiple_of, temperature=0.1, max_retention=0.75)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize(("num_units", "multiple_of"), [(100, 1), (100, 32), (96, 32), (20, 32)])
def test_a_group_may_go_where_removal_is_allowed(name: str, num_units: int, multiple_of: int) -> None:
    """To exactly nothing, also where the last step is a whole multiple or the only one."""
    free = budget(num_units, cost_U=1e-30 * rising_costs(num_units, 0))
    dear = [budget(num_units, block=block) for block in (1, 2)]
    options = {"temperature": 0.02, "allow_removal": True}
    assert allocate(name, [free, *dear], 1 / 3, multiple_of, **options) == [0, num_units, num_units]
    protected = allocate(name, [free, *dear], 1 / 3, multiple_of, protected=frozenset({0}), **options)
    assert protected[0] == num_units
    if multiple_of == 1:
        assert allocate(name, [free, *dear], 1 / 3, temperature=0.02)[0] == num_units // 10


@pytest.mark.parametrize("name", GLOBAL)
def test_all_groups_may_go_and_no_more(name: str) -> None:
    budgets = [budget(48, 96, bias=96, block=block) for block in range(2)]
    assert allocate(name, budgets, 0.97, 32, allow_removal=True) == [0, 0]
    with pytest.raises(InputError, match=r"biases.*at most 0\.9796.*Lower --sparsity\.") as refused:
        allocate(name, budgets, 0.99, 32, allow_removal=True)
    assert "--min-retention" not in str(refused.value)


def test_uniform_never_removes_a_group() -> None:
    with pytest.raises(InputError, match="no mlp units would be left"):
        allocate("uniform", [budget(48, 96)], 0.5, 32, allow_removal=True)


@pytest.mark.parametrize("name", DECIDING)
def test_protected_blocks_lose_nothing(name: str) -> None:
    budgets = [budget(100, block=block) for block in range(3)]
    kept = allocate(name, budgets, 0.3, protected=frozenset({1}))
    assert kept[1] == 100
    assert sum(kept) == 210


@pytest.mark.parametrize(
    "name",
    GLOBAL,
)
@pytest.mark.parametrize("sparsity", [0.0, 0.2])
def test_units_that_cost_nothing_go_only_as_far_as_asked(name: str, sparsity: float) -> None:
    """Dead channels cost exactly zero."""
    cost_U = rising_costs(100, 0).sort().values
    cost_U[:50] = 0
    budgets = [budget(100, block=block, cost_U=cost_U) for block in range(2)]
    assert sum(allocate(name, budgets, sparsity, temperature=0.5)) == round(200 * (1 - sparsity))


@pytest.mark.parametrize("price", [0.0, 1e-3])
def test_cheap_units_of_one_block_go_before_dear_ones_of_another(price: float) -> None:
    """Half of a block at one price, more of it than is asked: the threshold cannot split them, the rounding must."""
    cheap_U = rising_costs(100, 0).sort().values + 1
    cheap_U[:50] = price
    budgets = [budget(100, cost_U=cheap_U), budget(100, block=1, cost_U=rising_costs(100, 1) + 1)]
    assert allocate("closed-form", budgets, 0.2) == [60, 100]


def test_standardised_sees_the_shape_of_the_scores_and_not_their_level() -> None:
    """Ten times the score everywhere changes nothing; one outlier among equals makes all the others cheap."""
    even = rising_costs(100, 0).sort().values
    kept = allocate("standardised", [budget(100, cost_U=even), budget(100, block=1, cost_U=10 * even)], 0.3)
    assert kept == [70, 70]
    outlier = torch.ones(100, dtype=torch.float64)
    outlier[-1] = 1000
    kept = allocate("standardised", [budget(100, cost_U=even), budget(100, block=1, cost_U=outlier)], 0.3)
    # All but the outlier are a tenth of a deviation below the mean: dearer than the lowest of the even block.
    assert kept[1] == 100 - (60 - (100 - kept[0]))
    assert kept[0] < 70


def test_widths_from_outside_are_kept_as_they_are() -> None:
    """What is not named keeps everything, an odd dense width too; another number is held to the multiple."""
    budgets = [
        BlockBudget(block=block, kind="mlp", num_units=20, unit_size=3, module_size=60, multiple_of=8)
        for block in range(3)
    ]
    widths: dict[int, dict[UnitKind, int]] = {0: {"mlp": 16}, 2: {"attention": 1, "mlp": 0}}
    options = AllocationOptions(sparsity=0.9, min_retention=0.5, protected=frozenset({0}), widths=widths)
    assert ALLOCATORS.get("widths").allocate(budgets, options) == [16, 20, 0]
    with pytest.raises(InputError, match=r"block 1, mlp: .*multiple of 8; got 15, wanted 8 or 16"):
        ALLOCATORS.get("widths").allocate(budgets, AllocationOptions(sparsity=0.1, widths={1: {"mlp": 15}}))
