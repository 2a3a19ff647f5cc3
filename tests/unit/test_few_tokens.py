"""Experts with few tokens: the Gram that is solved, what it does to choice and weights, and what the report counts.

Shape suffixes: T tokens, O outputs, I inputs, U units, K kept inputs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from structprune.engine.layerwise.few_tokens import ExpertTokens, token_statistics, with_missing_tokens
from structprune.linalg.gram_products import in_float64
from structprune.rows import DiagonalRows
from structprune.scores import SCORES, SELECTORS
from structprune.solvers import SOLVERS
from structprune.types import LayerProblem, Moments

INPUTS, OUTPUTS = 12, 5


def moments(x_TI: Tensor) -> Moments:
    return Moments(gram_II=(x_TI.T @ x_TI).float(), num_tokens=len(x_TI), sum_I=x_TI.sum(dim=0).double())


def problem(*parts: Tensor, seed: int = 0, damping: float = 1e-2) -> LayerProblem:
    """Of one expert: sums over the tokens of the first part, and over those that choose the ridge."""
    generator = torch.Generator().manual_seed(seed)
    sums = [moments(x_TI) for x_TI in parts]
    return LayerProblem(
        weight_OI=torch.randn(OUTPUTS, INPUTS, generator=generator),
        fit=sums[0],
        held_out=sums[1] if len(sums) > 1 else None,
        width=1,
        damping=damping,
        producer_norms_MU=torch.ones(1, INPUTS),
    )


def tokens(num: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, INPUTS, generator=generator) * torch.linspace(0.2, 2.0, INPUTS)


def test_rows_of_a_diagonal_matrix() -> None:
    values_I = torch.tensor([1.0, 2.0, 0.0, 4.0, 5.0])
    matrix, whole_II = DiagonalRows(values_I=values_I), torch.diag(values_I)
    assert matrix.shape == whole_II.shape
    assert torch.equal(matrix[:], whole_II)
    assert torch.equal(matrix[1:3], whole_II[1:3])
    assert torch.equal(matrix[torch.tensor([4, 0])], whole_II[[4, 0]])
    assert torch.equal(matrix.diagonal(), whole_II.diagonal())
    assert torch.equal(matrix.to(torch.device("cpu"))[:], whole_II)


def test_without_a_token_the_gram_is_the_identity_and_no_weight_changes() -> None:
    given = problem(torch.zeros(0, INPUTS))
    found = with_missing_tokens(given)
    assert found.total().num_tokens == INPUTS
    torch.testing.assert_close(in_float64(found.total().gram_II) / INPUTS, torch.eye(INPUTS, dtype=torch.float64))
    keep_U = torch.arange(INPUTS) % 3 > 0
    for name in ("mask-only", "least-squares"):
        result = SOLVERS.get(name).solve(found, keep_U)
        assert torch.equal(result.weight_OK, given.weight_OI[:, keep_U])
    weight_OI = given.weight_OI
    for name, wanted_U in (
        ("wanda", weight_OI.abs().sum(dim=0)),
        ("l2", weight_OI.square().sum(dim=0)),
        ("fluctuation", weight_OI.square().sum(dim=0).double()),
    ):
        torch.testing.assert_close(SCORES.get(name).score(found), wanted_U)
    # Removing units changes no other weight either, so the searches keep the largest columns.
    largest = set(weight_OI.square().sum(dim=0).topk(7).indices.tolist())
    for name in SELECTORS:
        assert set(torch.nonzero(SELECTORS.get(name).keep(found, 7)).flatten().tolist()) == largest


@pytest.mark.parametrize("num", [1, 5, INPUTS - 1])
def test_missing_tokens_have_independent_inputs(num: int) -> None:
    x_TI = tokens(num)
    found = with_missing_tokens(problem(x_TI)).total()
    energy_I = x_TI.square().mean(dim=0).double()
    wanted_II = (x_TI.T @ x_TI).double() + (INPUTS - num - 1) * torch.diag(energy_I)
    wanted_II += energy_I.mean() * torch.eye(INPUTS, dtype=torch.float64)
    torch.testing.assert_close(in_float64(found.gram_II), wanted_II, rtol=1e-5, atol=1e-5)
    assert found.num_tokens == INPUTS
    # The energy of a token stays what it is.
    assert float(found.gram_II.diagonal().sum()) / INPUTS == pytest.approx(float(x_TI.square().sum()) / num, rel=1e-5)
    assert found.sum_I is not None
    torch.testing.assert_close(found.sum_I, x_TI.sum(dim=0).double())


def unchanged(found: LayerProblem, given: LayerProblem) -> None:
    """The very same sums: tensors have no equality of one bit."""
    assert all(getattr(found, field.name) is getattr(given, field.name) for field in dataclasses.fields(given))


def test_enough_tokens_are_left_alone() -> None:
    given = problem(tokens(INPUTS))
    unchanged(with_missing_tokens(given), given)
    both = problem(tokens(INPUTS - 4), tokens(4, seed=2))
    unchanged(with_missing_tokens(both), both)


@pytest.mark.parametrize("empty", [0, 1])
def test_a_ridge_cannot_be_chosen_with_all_tokens_on_one_side(empty: int) -> None:
    x_TI, none = tokens(20), torch.zeros(0, INPUTS)
    parts = (none, x_TI) if empty == 0 else (x_TI, none)
    found = with_missing_tokens(problem(*parts))
    assert found.held_out is None
    assert found.fit.num_tokens == 20
    torch.testing.assert_close(in_float64(found.fit.gram_II), (x_TI.T @ x_TI).double(), rtol=1e-5, atol=1e-5)
    assert SOLVERS.get("least-squares").solve(found, torch.arange(INPUTS) > 2).statistics["damping"] == 1e-2


def test_inputs_that_are_zero_say_as_little_as_no_token() -> None:
    given = problem(torch.zeros(3, INPUTS))
    result = SOLVERS.get("least-squares").solve(with_missing_tokens(given), torch.arange(INPUTS) > 2)
    assert torch.equal(result.weight_OK, given.weight_OI[:, 3:])


@pytest.mark.parametrize("num", [1, 3, 5, 8])
def test_it_generalises_better_than_the_few_tokens_alone(num: int) -> None:
    """Error on tokens that were not seen, the units chosen and the weights solved by either problem."""
    alone = supported = 0.0
    for seed in range(40):
        given = replace(problem(tokens(num, seed=seed), seed=seed, damping=1e-4), seed=seed)
        fresh_TI = tokens(400, seed=1000 + seed)
        for name, solved in (("alone", given), ("supported", with_missing_tokens(given))):
            keep_U = torch.zeros(INPUTS, dtype=torch.bool)
            keep_U[SCORES.get("wanda").score(solved).topk(8).indices] = True
            weight_OK = SOLVERS.get("least-squares").solve(solved, keep_U).weight_OK
            error = float((fresh_TI[:, keep_U] @ weight_OK.T - fresh_TI @ given.weight_OI.T).square().sum())
            if name == "alone":
                alone += error
            else:
                supported += error
    assert supported < 0.95 * alone


def test_what_the_report_counts() -> None:
    counts = [ExpertTokens(sent=sent, enough=50) for sent in (0, 0, 3, 49, 50, 90)]
    assert token_statistics(counts, 96) == {
        "experts_without_tokens": 2.0,
        "experts_with_few_tokens": 2.0,
        "least_expert_tokens": 0.0,
        "enough_expert_tokens": 50.0,
        "tokens": 96.0,
        # Fewer than one of 96 came to the least used: more than fifty times as many.
        "wanted_tokens": 4800.0,
    }
    # Three of 96 came to it: 50 would, of 1600.
    assert token_statistics(counts[2:], 96)["wanted_tokens"] == 1600.0
    assert token_statistics(counts[4:], 96)["wanted_tokens"] == 96.0
    assert token_statistics([], 96) == {}
