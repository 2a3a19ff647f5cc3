"""The block loop: factors that maps share, inputs in turn by the published formula, and the sets of a group."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from structprune.linalg.cholesky import DampedCholesky
from structprune.patterns import NM, sparse
from structprune.solvers.elements import PRUNERS, blockwise
from structprune.solvers.elements.problem import SharedFactor, SparseProblem, SparseSolution
from structprune.solvers.elements.unit import unit_problem
from support.sparse_problems import FOUR_OF_EIGHT, HALF, TWO_OF_FOUR, sparse_problem

pytestmark = pytest.mark.usefixtures("one_thread")


def solved(name: str, problem: SparseProblem) -> SparseSolution:
    return PRUNERS.get(name).prune(problem)


def test_maps_of_one_input_share_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second answer is bit for bit what it is alone; another ridge has a factor of its own."""
    made: list[float] = []
    original = blockwise.damped_cholesky

    def counted(gram: Any, damping: float, *rest: Any) -> DampedCholesky:
        made.append(damping)
        return original(gram, damping, *rest)

    monkeypatch.setattr(blockwise, "damped_cholesky", counted)
    first = sparse_problem(HALF)
    second = replace(first, weight_OI=first.weight_OI.flip(0) + 1)
    alone = solved("sparsegpt", second)
    shared, made[:] = SharedFactor(), []
    solved("sparsegpt", replace(first, shared=shared))
    together = solved("sparsegpt", replace(second, shared=shared))
    assert made == [1e-2]
    assert torch.equal(together.weight_OI, alone.weight_OI)
    other = replace(second, damping=0.1)
    assert torch.equal(
        solved("sparsegpt", replace(other, shared=shared)).weight_OI, solved("sparsegpt", other).weight_OI
    )
    assert made == [1e-2, 0.1, 0.1]


def test_inputs_in_turn_by_the_formula() -> None:
    """Column after column over all inputs behind it, as it is published: the loop by a few at a time says the same."""
    problem = sparse_problem(HALF)
    keep_OI = torch.rand(48, 96, generator=torch.Generator().manual_seed(0)) > 0.5
    found = blockwise.prune_blockwise(problem, blockwise.SPARSEGPT_CHOICE, "in turn", keep_OI=keep_OI)
    factor_II, _ = blockwise.upper_factor(problem)
    weight_OI = unit_problem(problem).weight_OI.clone()
    for place in range(96):
        error_O = torch.where(keep_OI[:, place], 0, weight_OI[:, place]) / factor_II[place, place]
        weight_OI[:, place:] -= error_O[:, None] * factor_II[place, place:]
    expected_OI = sparse(weight_OI / unit_problem(problem).scale_I, keep_OI)
    torch.testing.assert_close(found.weight_OI, expected_OI, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, FOUR_OF_EIGHT], ids=lambda pattern: pattern.name)
def test_apt_takes_the_set_of_a_group_that_costs_least(pattern: NM) -> None:
    """The first group by brute force: what the least-squares answer loses when a set goes and all inputs may move."""
    problem = sparse_problem(pattern, 4)
    unit = unit_problem(problem)
    inverse_II = torch.linalg.inv(unit.gram_II)
    gone_OI = ~solved("apt", problem).keep_OI
    for row in range(6):
        costs = {
            indices: float(
                unit.weight_OI[row, indices]
                @ torch.linalg.inv(inverse_II[indices, :][:, indices])
                @ unit.weight_OI[row, indices]
            )
            for indices in itertools.combinations(range(pattern.of), pattern.of - pattern.keep)
        }
        assert gone_OI[row, : pattern.of].nonzero().flatten().tolist() == list(min(costs, key=lambda key: costs[key]))
