"""Sums of two matrices that are read a few rows at a time, and problems that are made of two parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from structprune.linalg.gram_products import add_columns, block_of, in_float64, output_energy, times_gram
from structprune.rows import RowSum, SymmetricRows
from structprune.scores import SCORES, SELECTORS
from structprune.scores.selection import decision_objective, removal_path
from structprune.solvers.least_squares import least_squares, mean_bias
from structprune.types import LayerProblem, Moments, TaylorSums


def moments(num_tokens: int, seed: int) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(num_tokens, 24, generator=generator) @ (torch.eye(24) + 0.3)
    y_TO = torch.randn(num_tokens, 5, generator=generator)
    return Moments(
        gram_II=x_TI.T @ x_TI,
        num_tokens=num_tokens,
        sum_I=x_TI.double().sum(dim=0),
        target_OI=y_TO.T @ x_TI,
        target_energy=float(y_TO.square().sum()),
        residual_energy=float(num_tokens),
    )


def in_two_parts_and_whole() -> tuple[LayerProblem, LayerProblem]:
    """One problem whose sums are apart, and the same with one sum of each, made in float32."""
    generator = torch.Generator().manual_seed(3)
    fit, held_out = moments(90, 1), moments(40, 2)
    problem = LayerProblem(
        weight_OI=torch.randn(5, 24, generator=generator),
        fit=fit,
        held_out=held_out,
        width=2,
        damping=1e-3,
        shrinkage=0.1,
        producer_norms_MU=torch.rand(1, 12, generator=generator),
        sensitivity_OO=torch.eye(5) * torch.rand(5, generator=generator),
        taylor=TaylorSums(
            **dict.fromkeys(("signed_U", "first_U", "second_U", "mixed_U"), torch.rand(12, generator=generator))
        ),
    )
    whole = Moments(
        gram_II=fit.gram_II + held_out.gram_II,
        num_tokens=130,
        sum_I=fit.sum_I + held_out.sum_I,
        target_OI=fit.target_OI + held_out.target_OI,
        target_energy=fit.target_energy + held_out.target_energy,
        residual_energy=130.0,
    )
    return problem, replace(problem, fit=whole, held_out=None)


def test_rows_of_a_sum_are_sums_of_rows() -> None:
    first, second = torch.randn(7, 5), torch.randn(7, 5)
    both = RowSum(first=first, second=second)
    before = first.clone(), second.clone()
    assert both.shape == (7, 5)
    for rows in (slice(2, 6), torch.tensor([6, 0, 3])):
        assert torch.equal(both[rows], (first + second)[rows])
    assert torch.equal(both.diagonal(), (first + second).diagonal())
    assert torch.equal(both.to(torch.device("cpu"))[:], first + second)
    assert all(torch.equal(a, b) for a, b in zip(before, (first, second), strict=True))


def test_products_of_a_sum_are_those_of_the_matrix() -> None:
    apart, whole = (problem.total() for problem in in_two_parts_and_whole())
    left_OI, some_A, others_B = torch.randn(5, 24), torch.tensor([3, 4, 20]), torch.tensor([0, 23])
    assert isinstance(apart.gram_II, RowSum)
    for function, arguments in (
        (in_float64, ()),
        (block_of, (some_A, others_B)),
        (lambda gram_II: times_gram(left_OI, gram_II, None, others_B), ()),
        (lambda gram_II: times_gram(left_OI[:, some_A], gram_II, some_A, None), ()),
        (lambda gram_II: torch.tensor(output_energy(left_OI, gram_II)), ()),
    ):
        assert torch.equal(function(apart.gram_II, *arguments), function(whole.gram_II, *arguments))
    for columns in (None, some_A):
        sums = [
            add_columns(torch.ones(5, 24 if columns is None else 3).double(), t, columns)
            for t in (apart.target_OI, whole.target_OI)
        ]
        assert torch.equal(*sums)


@pytest.mark.parametrize("name", [*SCORES, *SELECTORS])
def test_units_are_chosen_by_the_sums_of_all_windows(name: str) -> None:
    def choose(problem: LayerProblem) -> torch.Tensor:
        return SELECTORS.get(name).keep(problem, 6) if name in SELECTORS else SCORES.get(name).score(problem)

    apart, whole = in_two_parts_and_whole()
    assert torch.equal(choose(apart), choose(whole))


def test_paths_objectives_and_answers_are_those_of_all_windows() -> None:
    apart, whole = in_two_parts_and_whole()
    keep_U = torch.arange(12) % 3 != 0
    assert torch.equal(removal_path(apart, 12).cost, removal_path(whole, 12).cost)
    assert decision_objective(apart, keep_U) == decision_objective(whole, keep_U)
    assert torch.equal(mean_bias(apart, keep_U).bias_O, mean_bias(whole, keep_U).bias_O)
    assert apart.total().residual_energy == whole.total().residual_energy
    chosen, kept_K, removed_P = least_squares(apart, keep_U), *map(whole.kept_inputs, (keep_U, ~keep_U))
    weight_OI, gram_II = whole.weight_OI.double(), in_float64(whole.fit.gram_II)
    gram_KK = gram_II[kept_K][:, kept_K]

    def solve(right_OI: torch.Tensor, damping: float) -> torch.Tensor:
        return torch.linalg.solve(gram_KK + damping * gram_KK.diagonal().diag(), right_OI[:, kept_K].T).T

    assert whole.fit.target_OI is not None
    residual_OI = torch.as_tensor(whole.fit.target_OI).double() - weight_OI @ gram_II
    local_OK = weight_OI[:, kept_K] + solve(weight_OI[:, removed_P] @ gram_II[removed_P], chosen.statistics["damping"])
    expected_OK = local_OK + solve(residual_OI, chosen.statistics["path_damping"])
    torch.testing.assert_close(chosen.weight_OK, expected_OK.to(chosen.weight_OK.dtype))


def test_a_problem_without_its_held_out_windows_is_that_of_the_others() -> None:
    apart, _ = in_two_parts_and_whole()
    fit = apart.without_held_out()
    assert fit.held_out is None
    assert fit.total() is apart.fit


def test_half_a_square_gives_all_of_its_rows() -> None:
    for size in (1, 5, 16, 37):
        x = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
        whole = x + x.T
        half = SymmetricRows.of(whole)
        assert half.shape == whole.shape
        assert torch.equal(half[:], whole)
        assert torch.equal(half[2:9], whole[2:9])
        numbers = torch.tensor([size - 1, 0, size // 2])
        assert torch.equal(half.to(torch.device("cpu"))[numbers], whole[numbers])
        assert torch.equal(half.diagonal(), whole.diagonal())
        assert sum(strip.numel() for strip in half.strips) <= size * (size + size // 16 + 2) // 2 + size
