"""The assignment of most value: objects belong to persons, and every object goes once."""

from __future__ import annotations

import itertools

import pytest
import torch

from structprune.linalg.assignment import best_assignment


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_best_of_all(count: int) -> None:
    value_NN = torch.randn(count, count, generator=torch.Generator().manual_seed(count))
    found_N = best_assignment(value_NN)
    best = max(sum(float(value_NN[n, o]) for n, o in enumerate(each)) for each in itertools.permutations(range(count)))
    assert found_N.sort().values.tolist() == list(range(count))
    assert float(value_NN[torch.arange(count), found_N].sum()) == pytest.approx(best, abs=1e-4)


def test_nobody_gets_nothing() -> None:
    assert best_assignment(torch.empty(0, 0)).tolist() == []
