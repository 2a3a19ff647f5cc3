"""1-swaps: no row's error rises, counts stay, and no exchange of a group is left that would pay."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from structprune.patterns import Pattern, Unstructured, sparse
from structprune.solvers.elements import PRUNERS, UPDATES
from structprune.solvers.elements.unit import unit_problem
from support.sparse_problems import HALF, TWO_OF_FOUR, damped_error, inputs, sparse_problem, sums

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = Unstructured(share=0.5, scope="row")


@pytest.mark.parametrize("pattern", [HALF, ROWS, TWO_OF_FOUR], ids=lambda pattern: pattern.name)
def test_exchanges_lower_the_error_of_every_row(pattern: Pattern) -> None:
    problem = sparse_problem(pattern, 1)
    start = PRUNERS.get("wanda").prune(problem)
    swapped = UPDATES.get("swaps").solve(problem, start)
    assert pattern.matches(swapped.weight_OI)
    assert torch.equal(swapped.keep_OI.sum(dim=1), start.keep_OI.sum(dim=1))
    assert torch.equal(swapped.weight_OI, sparse(problem.weight_OI, swapped.keep_OI))
    unit = unit_problem(problem)
    before_O, after_O = (
        ((away_OI @ unit.gram_II) * away_OI).sum(dim=1)
        for away_OI in (unit.weight_OI * ~each.keep_OI for each in (start, swapped))
    )
    assert (after_O <= before_O).all()
    assert float(after_O.sum()) < 0.85 * float(before_O.sum())
    refitted = UPDATES.get("swaps-refit").solve(problem, start)
    assert torch.equal(refitted.keep_OI, swapped.keep_OI)
    refit = UPDATES.get("refit").solve(problem, start)
    assert damped_error(problem, refitted) < damped_error(problem, refit)


def test_no_exchange_of_a_group_is_left_that_would_pay() -> None:
    """All pairs of all groups, by brute force."""
    problem = sparse_problem(TWO_OF_FOUR, 2)
    keep_OI = UPDATES.get("swaps").solve(problem, PRUNERS.get("wanda").prune(problem)).keep_OI
    unit = unit_problem(problem)

    def error(row: int, keep_I: Tensor) -> float:
        away_I = unit.weight_OI[row] * ~keep_I
        return float(away_I @ unit.gram_II @ away_I)

    for row in range(3):
        least = error(row, keep_OI[row])
        for group, (gone, back) in itertools.product(range(24), itertools.permutations(range(4), 2)):
            one, other = 4 * group + gone, 4 * group + back
            if keep_OI[row, one] and not keep_OI[row, other]:
                other_I = keep_OI[row].clone()
                other_I[one], other_I[other] = False, True
                # An exchange has to gain a ten-thousandth of what the mask began with.
                assert error(row, other_I) > least * (1 - 3e-4)


@pytest.mark.parametrize("pattern", [HALF, ROWS, TWO_OF_FOUR], ids=lambda pattern: pattern.name)
def test_regrown_weights_lower_what_a_row_is_expected_to_miss(pattern: Pattern) -> None:
    """DSnoT: |sum of w m over what went| rises in no row; counts, weights and groups stay as the pattern has them."""
    x_IT = inputs(3)
    x_IT += 2 * x_IT.std(dim=1, keepdim=True) * torch.randn(len(x_IT), 1, generator=torch.Generator().manual_seed(0))
    problem = sparse_problem(pattern, 3, moments=sums(x_IT))
    start = PRUNERS.get("wanda").prune(problem)
    found = UPDATES.get("dsnot").solve(problem, start)
    assert pattern.matches(found.weight_OI)
    assert torch.equal(found.keep_OI.sum(dim=1), start.keep_OI.sum(dim=1))
    assert torch.equal(found.weight_OI, sparse(problem.weight_OI, found.keep_OI))
    gain_OI = problem.weight_OI * x_IT.mean(dim=1)
    before_O, after_O = ((gain_OI * ~each.keep_OI).sum(dim=1).abs() for each in (start, found))
    assert (after_O <= before_O).all()
    assert float(after_O.sum()) < 0.35 * float(before_O.sum())
    # Means are most of these inputs' energy.
    assert damped_error(problem, found) < damped_error(problem, start)


def test_inputs_without_a_mean_are_left_alone() -> None:
    problem = sparse_problem(HALF)
    problem = replace(problem, moments=replace(problem.moments, sum_I=torch.zeros(96, dtype=torch.float64)))
    start = PRUNERS.get("wanda").prune(problem)
    assert torch.equal(UPDATES.get("dsnot").solve(problem, start).keep_OI, start.keep_OI)
