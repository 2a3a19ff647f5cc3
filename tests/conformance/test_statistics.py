"""The Gram: any split of the tokens gives one pass's result, exactly symmetric, close to float64, never silently NaN.

Shape suffixes: T tokens, I inputs.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structprune.errors import NumericalError
from structprune.statistics import GramAccumulator

# The strips of the product are a quarter of the width: every remainder, and widths with fewer inputs than strips.
WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, 13, 32, 33, 50]


def normal(num_tokens: int, num_inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, num_inputs, generator=torch.Generator().manual_seed(seed))


def integers(num_tokens: int, num_inputs: int, seed: int = 0) -> Tensor:
    """Small whole numbers: their sums of products are exact in float32, so results can be compared bit by bit."""
    return torch.randint(-8, 9, (num_tokens, num_inputs), generator=torch.Generator().manual_seed(seed)).float()


def gram(*batches: Tensor) -> Tensor:
    accumulator = GramAccumulator(batches[0].shape[1])
    for x_TI in batches:
        accumulator.update(x_TI)
    return accumulator.finalize("here")


@pytest.mark.parametrize("num_inputs", WIDTHS)
def test_equals_float64_product(num_inputs: int) -> None:
    x_TI = normal(200, num_inputs)
    expected_II = x_TI.double().T @ x_TI.double()
    actual_II = gram(x_TI)
    assert actual_II.dtype == torch.float32
    # Relative to |x_i| |x_j|, which bounds the entry: a small entry is a difference of large terms.
    norm_I = expected_II.diagonal().sqrt()
    assert ((actual_II.double() - expected_II).abs() <= 1e-6 * norm_I[:, None] * norm_I).all()


@pytest.mark.parametrize("num_inputs", WIDTHS)
def test_exact_on_whole_numbers(num_inputs: int) -> None:
    x_TI = integers(64, num_inputs)
    assert torch.equal(gram(x_TI), x_TI.T @ x_TI)


@pytest.mark.parametrize("num_inputs", WIDTHS)
def test_exactly_symmetric(num_inputs: int) -> None:
    gram_II = gram(normal(77, num_inputs, seed=1), normal(5, num_inputs, seed=2))
    assert torch.equal(gram_II, gram_II.T)


@settings(deadline=None, max_examples=25)
@given(
    num_inputs=st.integers(1, 12),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_any_split_of_batches_is_one_pass(num_inputs: int, sizes: list[int], seed: int) -> None:
    x_TI = integers(sum(sizes), num_inputs, seed)
    accumulator = GramAccumulator(num_inputs)
    for batch_TI in x_TI.split(sizes):
        accumulator.update(batch_TI)
    assert accumulator.num_tokens == sum(sizes)
    assert torch.equal(accumulator.finalize("here"), x_TI.T @ x_TI)


@settings(deadline=None, max_examples=25)
@given(num_inputs=st.integers(1, 12), first=st.integers(0, 20), second=st.integers(0, 20), seed=st.integers(0, 1000))
def test_merge_is_one_pass(num_inputs: int, first: int, second: int, seed: int) -> None:
    x_TI = integers(first + second, num_inputs, seed)
    a, b = GramAccumulator(num_inputs), GramAccumulator(num_inputs)
    a.update(x_TI[:first])
    b.update(x_TI[first:])
    a.merge(b)
    assert a.num_tokens == first + second
    assert torch.equal(a.finalize("here"), x_TI.T @ x_TI)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_summed_in_float32(dtype: torch.dtype) -> None:
    x_TI = normal(300, 9).to(dtype)
    actual_II = gram(x_TI)
    assert actual_II.dtype == torch.float32
    assert torch.equal(actual_II, gram(x_TI.float()))
    # A sum in bfloat16 would be off by percents after 300 tokens.
    expected_II = (x_TI.double().T @ x_TI.double()).float()
    torch.testing.assert_close(actual_II, expected_II, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("column", [0, 2, 6])
def test_not_finite_is_an_error_that_names_the_place(bad: float, column: int) -> None:
    x_TI = normal(10, 7)
    x_TI[4, column] = bad
    accumulator = GramAccumulator(7)
    accumulator.update(x_TI)
    with pytest.raises(NumericalError, match=r"^block 3 mlp: 1 of 7 activations") as caught:
        accumulator.finalize("block 3 mlp")
    assert caught.value.where == "block 3 mlp"


def test_sums_of_any_split_are_one_pass() -> None:
    x_TI = integers(60, 7)
    whole, first, second = GramAccumulator(7), GramAccumulator(7), GramAccumulator(7)
    whole.update(x_TI)
    first.update(x_TI[:13])
    second.update(x_TI[13:])
    first.merge(second)
    assert torch.equal(whole.sum_I, x_TI.double().sum(dim=0))
    assert torch.equal(first.sum_I, whole.sum_I)


def test_targets_are_summed_beside_the_inputs() -> None:
    x_TI, target_TO = integers(60, 7), integers(60, 3, seed=1)
    whole, first, second = (GramAccumulator(7, num_outputs=3) for _ in range(3))
    whole.update(x_TI, target_TO)
    first.update(x_TI[:13].bfloat16(), target_TO[:13])
    second.update(x_TI[13:].bfloat16(), target_TO[13:])
    first.merge(second)
    for accumulator in (whole, first):
        assert accumulator.target_OI is not None
        assert torch.equal(accumulator.target_OI, target_TO.T @ x_TI)
        assert accumulator.target_energy == pytest.approx(float(target_TO.double().square().sum()), rel=1e-6)


def test_batches_whose_float32_copy_is_kept() -> None:
    # Each is above the 8 MiB from which the copy stays; the second is shorter than the first, the third longer.
    sizes = [1100, 1050, 1200]
    x_TI = integers(sum(sizes), 2048)
    accumulator = GramAccumulator(2048)
    for batch_TI in x_TI.bfloat16().split(sizes):
        accumulator.update(batch_TI)
    assert torch.equal(accumulator.finalize("here"), x_TI.T @ x_TI)


def test_products_that_are_made_apart_give_the_same_sums() -> None:
    """As where the tokens are on a device whose memory has no room for the sums."""
    gen = torch.Generator().manual_seed(0)
    here, apart = (GramAccumulator(10, num_outputs=3, apart=apart) for apart in (False, True))
    for _ in range(3):
        x_TI, target_TO = torch.randn(7, 10, generator=gen), torch.randn(7, 3, generator=gen)
        for accumulator in (here, apart):
            accumulator.update(x_TI, target_TO)
    assert here.target_OI is not None
    assert apart.target_OI is not None
    torch.testing.assert_close(apart.target_OI, here.target_OI)
    torch.testing.assert_close(apart.finalize("here"), here.finalize("here"))
    assert torch.equal(apart.sum_I, here.sum_I)
