"""The auction: as good as the best of all assignments, and every object once."""

from __future__ import annotations

import itertools

import pytest
import torch

from structprune.linalg.assignment import best_assignment


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_best_of_all(count: int, seed: int) -> None:
    value_NN = torch.randn(count, count, generator=torch.Generator().manual_seed(seed))
    found_N = best_assignment(value_NN)
    best = max(sum(float(value_NN[n, o]) for n, o in enumerate(each)) for each in itertools.permutations(range(count)))
    assert found_N.sort().values.tolist() == list(range(count))
    assert float(value_NN[torch.arange(count), found_N].sum()) == pytest.approx(best, abs=1e-4)


def test_equal_values_are_anyones() -> None:
    assert best_assignment(torch.ones(5, 5)).sort().values.tolist() == list(range(5))
    value_NN = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    found_N = best_assignment(value_NN)
    assert found_N.sort().values.tolist() == [0, 1, 2]
    assert best_assignment(torch.empty(0, 0)).tolist() == []


def test_a_hidden_order_of_many_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    order_N = torch.randperm(100, generator=generator)
    value_NN = 0.5 * torch.rand(100, 100, generator=generator)
    value_NN[torch.arange(100), order_N] = 1
    assert torch.equal(best_assignment(value_NN), order_N)
