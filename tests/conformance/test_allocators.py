"""Every allocator: removes what was asked and at most one multiple per block more, keeps multiples, is monotone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structprune.allocation import ALLOCATORS
from structprune.allocation.uniform import BlockBudget
from structprune.errors import InputError


def budgets_of(num_units: int, unit_parameters: int, num_blocks: int = 1, bias: int = 0) -> list[BlockBudget]:
    return [
        BlockBudget(
            block=index,
            kind="mlp",
            num_units=num_units,
            unit_parameters=unit_parameters,
            module_parameters=num_units * unit_parameters + bias,
        )
        for index in range(num_blocks)
    ]


def total_removed(budgets: Sequence[BlockBudget], kept: Sequence[int]) -> int:
    return sum((b.num_units - k) * b.unit_parameters for b, k in zip(budgets, kept, strict=True))


@st.composite
def models(draw: st.DrawFn) -> tuple[list[BlockBudget], int]:
    """Blocks of ten multiples or more, so that a sparsity up to 0.8 always leaves something, and the multiple."""
    multiple_of = draw(st.integers(1, 64))
    num_units = draw(st.integers(10 * multiple_of, 40 * multiple_of))
    unit_parameters = draw(st.integers(1, 5000))
    bias = draw(st.integers(0, unit_parameters))
    return budgets_of(num_units, unit_parameters, draw(st.integers(1, 4)), bias), multiple_of


@pytest.mark.parametrize("name", list(ALLOCATORS))
@settings(deadline=None, max_examples=100)
@given(model=models(), sparsity=st.floats(1e-6, 0.8))
def test_removes_the_asked_share_and_at_most_one_multiple_more(
    name: str, model: tuple[list[BlockBudget], int], sparsity: float
) -> None:
    budgets, multiple_of = model
    kept = ALLOCATORS.get(name)(budgets, sparsity, multiple_of)
    assert len(kept) == len(budgets)
    assert all(0 < k <= b.num_units for b, k in zip(budgets, kept, strict=True))
    assert all(k == b.num_units or k % multiple_of == 0 for b, k in zip(budgets, kept, strict=True))
    asked = sparsity * sum(b.module_parameters for b in budgets)
    removed = total_removed(budgets, kept)
    assert removed >= asked * (1 - 1e-9) - 1e-6
    assert removed < asked + sum(multiple_of * b.unit_parameters for b in budgets)


@pytest.mark.parametrize("name", list(ALLOCATORS))
@pytest.mark.parametrize("num_units", [1, 7, 48, 1537])
@pytest.mark.parametrize("multiple_of", [1, 32, 4096])
def test_sparsity_zero_keeps_everything(name: str, num_units: int, multiple_of: int) -> None:
    budgets = budgets_of(num_units, 96, num_blocks=3, bias=32)
    assert ALLOCATORS.get(name)(budgets, 0.0, multiple_of) == [num_units] * 3


@pytest.mark.parametrize("name", list(ALLOCATORS))
@settings(deadline=None, max_examples=100)
@given(model=models(), shares=st.tuples(st.floats(0, 0.8), st.floats(0, 0.8)))
def test_monotone_in_sparsity(name: str, model: tuple[list[BlockBudget], int], shares: tuple[float, float]) -> None:
    budgets, multiple_of = model
    low, high = sorted(shares)
    allocator = ALLOCATORS.get(name)
    assert sum(allocator(budgets, low, multiple_of)) >= sum(allocator(budgets, high, multiple_of))


@pytest.mark.parametrize("name", list(ALLOCATORS))
def test_binary_rounding_takes_no_unit(name: str) -> None:
    """In binary 0.07 * 100 and 0.29 * 100 lie beside the whole number; the request is met exactly."""
    allocator = ALLOCATORS.get(name)
    assert 0.07 * 100 > 7
    assert allocator(budgets_of(100, 1), 0.07, 1) == [93]
    assert allocator(budgets_of(100, 1), 0.29, 1) == [71]


@pytest.mark.parametrize("name", list(ALLOCATORS))
@pytest.mark.parametrize(("num_units", "sparsity", "multiple_of"), [(48, 0.5, 32), (10, 0.95, 1), (1, 0.01, 1)])
def test_refuses_to_leave_nothing(name: str, num_units: int, sparsity: float, multiple_of: int) -> None:
    with pytest.raises(InputError, match=r"no mlp units would be left.*--sparsity or --multiple-of") as caught:
        ALLOCATORS.get(name)(budgets_of(num_units, 96), sparsity, multiple_of)
    assert caught.value.where == "block 0"


def test_uniform_treats_blocks_alike_and_each_meets_the_share() -> None:
    budgets = [*budgets_of(100, 10), *budgets_of(200, 3, bias=2)]
    kept = ALLOCATORS.get("uniform")(budgets, 0.25, 8)
    assert kept == [72, 144]
    # A bias belongs to no unit but counts in the module: 0.25 of 602 parameters are more than 50 units of 3.
    assert ALLOCATORS.get("uniform")(budgets[1:], 0.25, 1) == [149]
