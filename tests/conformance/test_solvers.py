"""Every solver: never worse than the mask, indifferent to the order of the units, deterministic, sound on bad Grams.

Shape suffixes: T tokens, O outputs, I inputs, U units, K kept inputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structprune.errors import NumericalError
from structprune.linalg.gram_products import in_float64
from structprune.scores.selection import removal_path
from structprune.solvers import SOLVERS, least_squares
from structprune.solvers.least_squares import judged_least_squares
from structprune.types import LayerProblem, Moments, SolveResult

# Solvers that read the Gram, and so must state the damping that they took.
UPDATING = [name for name in SOLVERS if name not in ("mask-only", "bias")]
WIDTHS = [1, 3]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(num_tokens: int, num_inputs: int, seed: int = 0) -> Tensor:
    """Tokens whose inputs depend on each other, so that the kept inputs can stand in for the removed ones."""
    mix_II = torch.randn(num_inputs, num_inputs, generator=generator(seed), dtype=torch.float64) / num_inputs**0.5
    return torch.randn(num_tokens, num_inputs, generator=generator(seed + 1), dtype=torch.float64) @ mix_II


def make_problem(
    x_TI: Tensor, width: int = 1, *, num_outputs: int = 6, damping: float = 1e-4, dtype: torch.dtype = torch.float32
) -> LayerProblem:
    num_inputs = x_TI.shape[1]
    return LayerProblem(
        weight_OI=torch.randn(num_outputs, num_inputs, generator=generator(7)).to(dtype),
        fit=Moments(gram_II=x_TI.T @ x_TI, num_tokens=len(x_TI), sum_I=x_TI.double().sum(dim=0)),
        width=width,
        damping=damping,
        producer_norms_MU=torch.ones(1, num_inputs // width),
    )


def cross(weight_OI: Tensor, moments: Moments) -> Tensor:
    """Sum of y x^T."""
    return weight_OI @ moments.gram_II if moments.target_OI is None else moments.target_OI


def keep_mask(num_units: int, kept: list[int]) -> Tensor:
    return torch.zeros(num_units, dtype=torch.bool).index_fill(0, torch.tensor(kept, dtype=torch.int64), True)


def dense_weight(problem: LayerProblem, keep_U: Tensor, weight_OK: Tensor) -> Tensor:
    """The kept columns at their places, zeros elsewhere."""
    weight_OI = torch.zeros(problem.weight_OI.shape, dtype=torch.float64)
    weight_OI[:, problem.kept_inputs(keep_U)] = weight_OK.double()
    return weight_OI


def quadratic_error(difference_OI: Tensor, gram_II: Tensor) -> float:
    """tr(D G D^T): squared output error summed over tokens."""
    return float(((difference_OI @ gram_II) * difference_OI).sum(dtype=torch.float64))


def error(problem: LayerProblem, keep_U: Tensor, weight_OK: Tensor) -> float:
    difference_OI = problem.weight_OI.double() - dense_weight(problem, keep_U, weight_OK)
    return quadratic_error(difference_OI, problem.fit.gram_II.double())


def energy(problem: LayerProblem) -> float:
    return quadratic_error(problem.weight_OI.double(), problem.fit.gram_II.double())


@pytest.mark.parametrize("name", list(SOLVERS))
@settings(deadline=None, max_examples=15)
@given(
    width=st.sampled_from(WIDTHS),
    num_tokens=st.integers(1, 60),
    kept=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True),
    seed=st.integers(0, 1000),
)
def test_never_worse_than_the_mask(name: str, width: int, num_tokens: int, kept: list[int], seed: int) -> None:
    problem = make_problem(correlated(num_tokens, 8 * width, seed), width)
    keep_U = keep_mask(8, kept)
    result = SOLVERS.get(name).solve(problem, keep_U)
    assert result.weight_OK.shape == (6, len(kept) * width)
    assert result.weight_OK.dtype == problem.weight_OI.dtype
    mask_error = error(problem, keep_U, problem.weight_OI[:, problem.kept_inputs(keep_U)])
    # The answer is rounded to the weight's float32 once.
    assert error(problem, keep_U, result.weight_OK) <= mask_error * (1 + 1e-6) + 1e-9 * energy(problem)


@pytest.mark.parametrize("name", UPDATING)
@pytest.mark.parametrize("width", WIDTHS)
def test_better_than_the_mask_on_correlated_inputs(name: str, width: int) -> None:
    problem = make_problem(correlated(40, 8 * width), width)
    keep_U = keep_mask(8, [0, 2, 3, 5, 6, 7])
    result = SOLVERS.get(name).solve(problem, keep_U)
    mask_error = error(problem, keep_U, problem.weight_OI[:, problem.kept_inputs(keep_U)])
    assert error(problem, keep_U, result.weight_OK) < 0.8 * mask_error


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_keep_is_identity(name: str, width: int, dtype: torch.dtype) -> None:
    problem = make_problem(correlated(30, 8 * width), width, dtype=dtype)
    result = SOLVERS.get(name).solve(problem, torch.ones(8, dtype=torch.bool))
    assert result.status == "ok"
    assert torch.equal(result.weight_OK, problem.weight_OI)


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("width", WIDTHS)
def test_permutation_equivariant(name: str, width: int) -> None:
    problem = make_problem(correlated(50, 8 * width), width)
    keep_U = keep_mask(8, [1, 2, 5, 7])
    order_U = torch.randperm(8, generator=generator(3))
    order_I = (order_U[:, None] * width + torch.arange(width)).flatten()
    permuted = replace(
        problem,
        weight_OI=problem.weight_OI[:, order_I],
        fit=problem.fit.reordered(order_I),
        producer_norms_MU=problem.producer_norms_MU[:, order_U],
    )
    solver = SOLVERS.get(name).solve
    expected_OI = dense_weight(problem, keep_U, solver(problem, keep_U).weight_OK)[:, order_I]
    keep_permuted_U = keep_U[order_U]
    actual_OI = dense_weight(permuted, keep_permuted_U, solver(permuted, keep_permuted_U).weight_OK)
    torch.testing.assert_close(actual_OI, expected_OI, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("part", ["gram", "sums"])
def test_depends_on_what_it_says_that_it_reads(name: str, part: str) -> None:
    problem = make_problem(correlated(50, 8), 1)
    keep_U = keep_mask(8, [0, 2, 3, 5, 6, 7])
    changed = {
        "gram": replace(problem.fit, gram_II=problem.fit.gram_II + torch.ones(8, 8)),
        "sums": replace(problem.fit, sum_I=torch.arange(8, dtype=torch.float64)),
    }[part]
    solver = SOLVERS.get(name)
    first, second = solver.solve(problem, keep_U), solver.solve(replace(problem, fit=changed), keep_U)
    same = torch.equal(first.weight_OK, second.weight_OK)
    if first.bias_O is not None and second.bias_O is not None:
        same = same and torch.equal(first.bias_O, second.bias_O)
    assert (part in solver.reads) == (not same)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_changes_what_it_says(name: str) -> None:
    """Producers are moved by `propose` alone, which is there for the solvers that say so."""
    problem = make_problem(correlated(50, 8), 1)
    keep_U = keep_mask(8, [0, 2, 3, 5, 6, 7])
    solver = SOLVERS.get(name)
    result = solver.solve(problem, keep_U)
    cut_OK = problem.weight_OI[:, problem.kept_inputs(keep_U)]
    assert ("consumer" in solver.changes) == (not torch.equal(result.weight_OK, cut_OK))
    assert ("biases" in solver.changes) == (result.bias_O is not None)
    assert ("producers" in solver.changes) == (solver.propose is not None)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_deterministic_and_leaves_the_problem_alone(name: str) -> None:
    problem = make_problem(correlated(50, 24), 3)
    before_OI, before_II = problem.weight_OI.clone(), problem.fit.gram_II.clone()
    keep_U = keep_mask(8, [0, 3, 4])
    first = SOLVERS.get(name).solve(problem, keep_U)
    second = SOLVERS.get(name).solve(problem, keep_U)
    assert torch.equal(first.weight_OK, second.weight_OK)
    assert (first.status, first.statistics) == (second.status, second.statistics)
    assert torch.equal(problem.weight_OI, before_OI)
    assert torch.equal(problem.fit.gram_II, before_II)


@pytest.mark.parametrize("width", WIDTHS)
def test_least_squares_equals_the_reference(width: int) -> None:
    x_TI = torch.randn(200, 8 * width, generator=generator(5), dtype=torch.float64) + 0.5
    problem = make_problem(x_TI, width, damping=1e-12, dtype=torch.float64)
    keep_U = keep_mask(8, [0, 1, 4, 6])
    kept_K = problem.kept_inputs(keep_U)
    reference_KO = torch.linalg.lstsq(x_TI[:, kept_K], x_TI @ problem.weight_OI.T).solution
    result = SOLVERS.get("least-squares").solve(problem, keep_U)
    assert result.weight_OK.dtype == torch.float64
    torch.testing.assert_close(result.weight_OK, reference_KO.T, rtol=1e-9, atol=1e-9)


def test_least_squares_minimises_the_damped_objective() -> None:
    """With a real ridge: the gradient of sum |V x_K - W x|^2 + delta |V - W_K|^2 vanishes at the answer."""
    problem = make_problem(correlated(50, 12), damping=0.1, dtype=torch.float64)
    keep_U = keep_mask(12, [0, 1, 2, 5, 8, 9])
    kept_K = problem.kept_inputs(keep_U)
    result = SOLVERS.get("least-squares").solve(problem, keep_U)
    delta = 0.1 * float(problem.fit.gram_II.diagonal()[kept_K].mean())
    residual_OI = dense_weight(problem, keep_U, result.weight_OK) - problem.weight_OI
    gradient_OK = (residual_OI @ problem.fit.gram_II)[:, kept_K]
    gradient_OK += delta * (result.weight_OK - problem.weight_OI[:, kept_K])
    torch.testing.assert_close(gradient_OK, torch.zeros_like(gradient_OK), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("num_tokens", [1, 5, 23])
def test_fewer_tokens_than_inputs(name: str, num_tokens: int) -> None:
    # In float32, as the statistics are: rounding may push zero eigenvalues below zero.
    problem = make_problem(correlated(num_tokens, 24).float(), damping=1e-4)
    keep_U = keep_mask(24, list(range(0, 24, 2)))
    result = SOLVERS.get(name).solve(problem, keep_U)
    assert torch.isfinite(result.weight_OK).all()
    mask_error = error(problem, keep_U, problem.weight_OI[:, problem.kept_inputs(keep_U)])
    assert error(problem, keep_U, result.weight_OK) <= mask_error * (1 + 1e-5) + 1e-5 * energy(problem)
    if name in UPDATING:
        assert result.statistics["damping"] >= problem.damping


@pytest.mark.parametrize("name", list(SOLVERS))
def test_columns_of_zeros(name: str) -> None:
    """Dead channels, kept and removed: their weights stay, the others are solved."""
    x_TI = correlated(60, 12)
    x_TI[:, [0, 3, 4]] = 0
    problem = make_problem(x_TI)
    keep_U = keep_mask(12, [0, 1, 3, 5, 8, 9])
    result = SOLVERS.get(name).solve(problem, keep_U)
    assert torch.isfinite(result.weight_OK).all()
    dead = [0, 2]  # places of inputs 0 and 3 among the kept
    torch.testing.assert_close(result.weight_OK[:, dead], problem.weight_OI[:, [0, 3]])
    mask_error = error(problem, keep_U, problem.weight_OI[:, problem.kept_inputs(keep_U)])
    assert error(problem, keep_U, result.weight_OK) <= mask_error * (1 + 1e-6)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_gram_of_zeros_is_the_mask(name: str) -> None:
    problem = make_problem(torch.zeros(10, 8, dtype=torch.float64))
    keep_U = keep_mask(8, [2, 5, 6])
    result = SOLVERS.get(name).solve(problem, keep_U)
    torch.testing.assert_close(result.weight_OK, problem.weight_OI[:, [2, 5, 6]])
    assert result.status == "ok"
    if name in UPDATING:
        assert result.statistics["damping"] == problem.damping


@pytest.mark.parametrize("name", UPDATING)
def test_raised_damping_is_stated(name: str) -> None:
    """Slightly indefinite: the asked damping is not enough, a hundred times more is."""
    problem = make_problem(correlated(4, 12))
    shift = 3e-3 * float(problem.fit.gram_II.diagonal().mean())
    shifted = replace(problem.fit, gram_II=problem.fit.gram_II - shift * torch.eye(12, dtype=torch.float64))
    problem = replace(problem, fit=shifted)
    result = SOLVERS.get(name).solve(problem, keep_mask(12, list(range(8))))
    assert result.status == "damping-raised"
    assert result.statistics["damping_raises"] == 2
    assert result.statistics["damping"] == pytest.approx(1e-2)
    assert torch.isfinite(result.weight_OK).all()


@pytest.mark.parametrize("name", UPDATING)
def test_indefinite_gram_is_an_error(name: str) -> None:
    gram_II = torch.eye(4, dtype=torch.float64)
    gram_II[0, 1] = gram_II[1, 0] = -1000.0
    problem = make_problem(correlated(10, 4))
    problem = replace(problem, fit=replace(problem.fit, gram_II=gram_II))
    with pytest.raises(NumericalError, match="indefinite"):
        SOLVERS.get(name).solve(problem, keep_mask(4, [0, 1, 2]))


@pytest.mark.parametrize("name", UPDATING)
def test_nan_in_the_gram_is_an_error(name: str) -> None:
    problem = make_problem(correlated(10, 4))
    problem.fit.gram_II[1, 1] = float("nan")
    with pytest.raises(NumericalError):
        SOLVERS.get(name).solve(problem, keep_mask(4, [0, 1, 2]))


def split_problem(
    num_noise: int, *, path: bool, seed: int = 0, scale_O: Sequence[float] = (1.0,) * 6, held_out: bool = True
) -> LayerProblem:
    """Sums over 60 tokens, those of the last 20 apart where some are `held_out`.

    `num_noise` columns of the target are noise that nothing predicts. Output o of the map is `scale_O[o]` times as
    large as the others.
    """
    x_TI = correlated(60, 12, seed)
    weight_OI = torch.randn(len(scale_O), 12, generator=generator(seed + 2), dtype=torch.float64)
    weight_OI *= torch.tensor(scale_O)[:, None]
    y_TO = x_TI @ weight_OI.T
    y_TO[:, :num_noise] += 3 * torch.randn(60, num_noise, generator=generator(seed + 3), dtype=torch.float64)

    def moments(rows: slice) -> Moments:
        x, y = x_TI[rows], y_TO[rows]
        return Moments(
            gram_II=x.T @ x,
            num_tokens=len(x),
            target_OI=y.T @ x if path else None,
            target_energy=float(y.square().sum()) if path else None,
        )

    return LayerProblem(
        weight_OI=weight_OI,
        fit=moments(slice(0, 40 if held_out else 60)),
        width=1,
        damping=1e-2,
        producer_norms_MU=torch.ones(1, 12),
        held_out=moments(slice(40, 60)) if held_out else None,
    )


def rescaled(problem: LayerProblem, scale_I: Tensor) -> LayerProblem:
    """The same function: inputs times `scale_I`, weights divided by it."""

    def moments(part: Moments) -> Moments:
        target_OI = None if part.target_OI is None else torch.as_tensor(part.target_OI) * scale_I
        gram_II = torch.as_tensor(part.gram_II) * scale_I * scale_I[:, None]
        return replace(part, gram_II=gram_II, target_OI=target_OI)

    assert problem.held_out is not None
    weight_OI = problem.weight_OI / scale_I
    return replace(problem, weight_OI=weight_OI, fit=moments(problem.fit), held_out=moments(problem.held_out))


@pytest.mark.parametrize("path", [False, True])
def test_the_scale_of_an_input_changes_nothing(path: bool) -> None:
    """Whether a unit's activations are large and its weights small or the other way round is the model's own affair."""
    problem, keep_U = split_problem(3, path=path), keep_mask(12, list(range(1, 9)))
    scale_I = torch.ones(12, dtype=torch.float64)
    scale_I[2], scale_I[5] = 300.0, 1e-3
    scaled = rescaled(problem, scale_I)
    found, other = (SOLVERS.get("least-squares").solve(each, keep_U) for each in (problem, scaled))
    torch.testing.assert_close(other.weight_OK * scale_I[problem.kept_inputs(keep_U)], found.weight_OK)
    assert other.statistics == pytest.approx(found.statistics)
    first, second = (removal_path(each, 8) for each in (problem, scaled))
    torch.testing.assert_close(second.order, first.order)
    torch.testing.assert_close(second.cost, first.cost)


def test_noise_gets_the_larger_ridge() -> None:
    """The inputs can make up for what the weight lacks; noise they cannot."""
    keep_U = keep_mask(12, list(range(8)))

    def solved(num_noise: int, seed: int) -> SolveResult:
        problem = split_problem(num_noise, path=True, seed=seed)
        lacking_OI = 0.1 * torch.randn(6, 12, generator=generator(9), dtype=torch.float64)
        return judged_least_squares(replace(problem, weight_OI=problem.weight_OI + lacking_OI), keep_U)

    raised: list[float] = []
    for seed in range(8):
        clean, noisy = solved(0, seed), solved(6, seed)
        assert noisy.statistics["held_out_error"] > clean.statistics["held_out_error"]
        # None where the noise got no correction at all.
        raised.append(noisy.statistics.get("path_damping", math.inf) / clean.statistics["path_damping"])
    # By a step of the grid in any draw, and in most by more.
    assert min(raised) > 1
    assert median(raised) > 10


@pytest.mark.parametrize("path", [False, True])
def test_the_chosen_ridge_is_the_best_of_the_grid_on_held_out_tokens(path: bool) -> None:
    """Brute force over the local grid: solve on 40 tokens with each ridge, measure on the other 20."""
    problem = split_problem(2, path=path)
    assert problem.held_out is not None
    keep_U = keep_mask(12, [0, 2, 3, 5, 7, 8, 11])
    kept_K = problem.kept_inputs(keep_U)
    result = judged_least_squares(problem, keep_U)
    fit, held_out = problem.fit, problem.held_out
    fit_cross_OI, held_cross_OI = cross(problem.weight_OI, fit), cross(problem.weight_OI, held_out)
    energy = held_out.target_energy or float((held_cross_OI * problem.weight_OI).sum())

    def held_out_error(local: float, residual: float) -> float:
        def solve(right_OK: Tensor, damping: float) -> Tensor:
            if math.isinf(damping):
                return torch.zeros_like(right_OK)
            gram_KK = fit.gram_II[kept_K][:, kept_K]
            ridge_KK = damping * gram_KK.diagonal().diag()
            return torch.linalg.solve(gram_KK + ridge_KK, right_OK.T).T

        missing_OK = (problem.weight_OI * ~keep_U) @ fit.gram_II[:, kept_K]
        residual_OK = (fit_cross_OI - problem.weight_OI @ fit.gram_II)[:, kept_K]
        weight_OK = problem.weight_OI[:, kept_K] + solve(missing_OK, local) + solve(residual_OK, residual)
        gram_KK = held_out.gram_II[kept_K][:, kept_K]
        square = ((weight_OK @ gram_KK - 2 * held_cross_OI[:, kept_K]) * weight_OK).sum()
        return (energy + float(square)) / energy

    local, residual = (result.statistics.get(name, math.inf) for name in ("damping", "path_damping"))
    assert result.statistics["held_out_error"] == pytest.approx(held_out_error(local, residual), rel=1e-9)
    if path:
        errors = [held_out_error(local, damping) for damping in (1e-2, 1e-1, 1.0, 10.0, 100.0, math.inf)]
        assert result.statistics["held_out_error"] == pytest.approx(min(errors), rel=1e-9)
    else:
        errors = [held_out_error(damping, math.inf) for damping in (1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)]
        assert result.statistics["held_out_error"] == pytest.approx(min(errors), rel=1e-9)


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_mixtures_of_outputs_choose_as_all_outputs_do(seed: int, path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Most of the energy is that of two outputs, which a choice among rows would miss.
    problem = replace(split_problem(9, path=path, seed=seed, scale_O=[30.0] * 2 + [1.0] * 38), seed=seed)
    keep_U = keep_mask(12, [0, 2, 3, 5, 7, 8, 11])
    exact = judged_least_squares(problem, keep_U).statistics
    monkeypatch.setattr(least_squares, "SKETCH_ROWS", 16)
    mixed = judged_least_squares(problem, keep_U).statistics
    assert mixed["held_out_error"] >= exact["held_out_error"] * (1 - 1e-9)
    assert mixed["held_out_error"] <= exact["held_out_error"] * 1.02


def test_the_answer_is_solved_on_all_tokens() -> None:
    # Where the weight lacks something, there is a second correction to make.
    lacking_OI = 0.3 * torch.randn(6, 12, generator=generator(9), dtype=torch.float64)
    problem = split_problem(2, path=True)
    problem = replace(problem, weight_OI=problem.weight_OI + lacking_OI)
    keep_U = keep_mask(12, list(range(8)))
    chosen = SOLVERS.get("least-squares").solve(problem, keep_U)
    assert chosen.statistics["damping"] != chosen.statistics["path_damping"]
    whole = replace(split_problem(2, path=True, held_out=False), weight_OI=problem.weight_OI)
    gram_II, kept_K = whole.fit.gram_II, whole.kept_inputs(keep_U)
    gram_KK = gram_II[kept_K][:, kept_K]

    def solve(right_OK: Tensor, damping: float) -> Tensor:
        return torch.linalg.solve(gram_KK + damping * gram_KK.diagonal().diag(), right_OK.T).T

    missing_OK = (whole.weight_OI * ~keep_U) @ gram_II[:, kept_K]
    residual_OK = (cross(whole.weight_OI, whole.fit) - whole.weight_OI @ gram_II)[:, kept_K]
    expected_OK = whole.weight_OI[:, kept_K] + solve(missing_OK, chosen.statistics["damping"])
    expected_OK += solve(residual_OK, chosen.statistics["path_damping"])
    torch.testing.assert_close(chosen.weight_OK, expected_OK)


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("tokens", [2, 8, 16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_a_repair_is_never_worse_than_none_on_held_out_tokens(seed: int, tokens: int, path: bool) -> None:
    """Fewer tokens than inputs, whose correlations are an accident; the ridge of old follows them."""
    x_TI = torch.randn(2 * tokens, 24, generator=generator(seed), dtype=torch.float64)
    weight_OI = torch.randn(6, 24, generator=generator(seed + 2), dtype=torch.float64)
    y_TO = x_TI @ weight_OI.T + torch.randn(2 * tokens, 6, generator=generator(seed + 3), dtype=torch.float64)

    def moments(rows: slice) -> Moments:
        x, y = x_TI[rows], y_TO[rows]
        target, energy = (y.T @ x, float(y.square().sum())) if path else (None, None)
        return Moments(gram_II=x.T @ x, num_tokens=len(x), target_OI=target, target_energy=energy)

    problem = LayerProblem(
        weight_OI=weight_OI,
        fit=moments(slice(0, tokens)),
        held_out=moments(slice(tokens, None)),
        width=1,
        damping=1e-4,
        producer_norms_MU=torch.ones(1, 24),
    )
    keep_U = keep_mask(24, list(range(16)))
    kept_K = problem.kept_inputs(keep_U)
    held_x, held_y = x_TI[tokens:], (y_TO if path else x_TI @ weight_OI.T)[tokens:]

    def relative_error(weight_OK: Tensor) -> float:
        return float((held_x[:, kept_K] @ weight_OK.T - held_y).square().sum() / held_y.square().sum())

    cut = relative_error(weight_OI[:, kept_K])
    repaired = judged_least_squares(problem, keep_U).statistics["held_out_error"]
    assert repaired <= cut * (1 + 1e-9)
    if tokens <= 8:
        # What the repair is kept from.
        fixed = SOLVERS.get("least-squares").solve(problem.without_held_out(), keep_U).weight_OK
        assert relative_error(fixed) > repaired


@pytest.mark.parametrize("width", WIDTHS)
def test_bias_is_the_best_constant(width: int) -> None:
    x_TI = correlated(50, 8 * width) + 0.7
    problem = make_problem(x_TI, width, dtype=torch.float64)
    keep_U = keep_mask(8, [0, 2, 5])
    result = SOLVERS.get("bias").solve(problem, keep_U)
    kept_K = problem.kept_inputs(keep_U)
    missing_TO = x_TI @ problem.weight_OI.T - x_TI[:, kept_K] @ result.weight_OK.T
    assert result.bias_O is not None
    torch.testing.assert_close(result.bias_O, missing_TO.mean(dim=0))
    assert torch.equal(result.weight_OK, problem.weight_OI[:, kept_K])


def by_texts(
    problem: LayerProblem, noise: Sequence[float], seed: int
) -> tuple[LayerProblem, list[Tensor], list[Tensor]]:
    """The problem with held-out tokens of texts that are ever larger and carry so much noise each; those tokens.

    Returns it with inputs and targets of each text: targets on the dense path where the problem has them, else W x.
    """
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    parts: list[Moments] = []
    path = problem.fit.target_OI is not None
    for number, share in enumerate(noise):
        x_TI = correlated(20, 12, seed + 10 * number) * 5.0**number
        y_TO = x_TI @ problem.weight_OI.T
        if path:
            y_TO = y_TO + share * float(y_TO.std()) * torch.randn(
                y_TO.shape, generator=generator(seed + 50 + number), dtype=torch.float64
            )
        xs.append(x_TI)
        ys.append(y_TO)
        parts.append(
            Moments(
                gram_II=x_TI.T @ x_TI,
                num_tokens=20,
                target_OI=y_TO.T @ x_TI if path else None,
                target_energy=float(y_TO.square().sum()) if path else None,
            )
        )
    held_out = functools.reduce(Moments.__add__, parts)
    return replace(problem, held_out=held_out, held_out_by_text=parts), xs, ys


def worst_error(problem: LayerProblem, keep_U: Tensor, xs: list[Tensor], ys: list[Tensor], ridges: Any) -> float:
    """The largest relative error of any text with the consumer solved on the fitted tokens, by its residuals."""
    kept_K, fit = problem.kept_inputs(keep_U), problem.fit
    gram_KK = in_float64(fit.gram_II)[kept_K][:, kept_K]

    def solve(right_OK: Tensor, damping: float) -> Tensor:
        if math.isinf(damping):
            return torch.zeros_like(right_OK)
        ridge_KK = damping * gram_KK.diagonal().diag()
        return torch.linalg.solve(gram_KK + ridge_KK, right_OK.T).T

    missing_OK = (problem.weight_OI * ~keep_U) @ fit.gram_II[:, kept_K]
    residual_OK = (cross(problem.weight_OI, fit) - problem.weight_OI @ fit.gram_II)[:, kept_K]
    weight_OK = problem.weight_OI[:, kept_K] + solve(missing_OK, ridges[0]) + solve(residual_OK, ridges[1])
    return max(
        float((x_TI[:, kept_K] @ weight_OK.T - y_TO).square().sum() / y_TO.square().sum())
        for x_TI, y_TO in zip(xs, ys, strict=True)
    )


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_ridge_that_is_best_for_the_worst_text(seed: int, path: bool) -> None:
    """Brute force over the grids, from the tokens themselves; the path's ridge is chosen behind the local one."""
    keep_U = keep_mask(12, [0, 2, 3, 5, 7, 8, 11])
    problem, xs, ys = by_texts(split_problem(2, path=path, seed=seed), (2.0, 0.3, 0.1), seed)
    found = judged_least_squares(problem, keep_U).statistics
    taken = tuple(found.get(name, math.inf) for name in ("damping", "path_damping"))
    none = (math.inf, math.inf)
    others = [
        none,
        *((taken[0], path_ridge) for path_ridge in (1e-2, 1e-1, 1.0, 10.0, 100.0, math.inf) if path),
        *((local, math.inf) for local in (1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf) if not path),
    ]
    errors = [worst_error(problem, keep_U, xs, ys, ridges) for ridges in others]
    assert found["held_out_error"] == pytest.approx(worst_error(problem, keep_U, xs, ys, taken), rel=1e-9)
    assert found["held_out_error"] == pytest.approx(min(errors), rel=1e-9)


def test_the_worst_text_asks_for_another_ridge_than_all_together() -> None:
    """A large text of few surprises outweighs a small one, until each counts beside its own size."""
    keep_U = keep_mask(12, [0, 2, 3, 5, 7, 8, 11])
    differ = 0
    for seed in range(8):
        problem, xs, ys = by_texts(split_problem(4, path=True, seed=seed), (2.0, 0.3, 0.1), seed)
        worst = SOLVERS.get("least-squares").solve(problem, keep_U).statistics
        mean = SOLVERS.get("least-squares").solve(replace(problem, held_out_by_text=()), keep_U).statistics
        ridges = [tuple(s.get(name, math.inf) for name in ("damping", "path_damping")) for s in (worst, mean)]
        if ridges[0] != ridges[1]:
            differ += 1
        found, other = (worst_error(problem, keep_U, xs, ys, pair) for pair in ridges)
        assert found <= other * (1 + 1e-9) or ridges[0][0] != ridges[1][0]
    assert differ


@pytest.mark.parametrize("path", [False, True])
def test_one_text_chooses_as_all_windows_together_do(path: bool) -> None:
    keep_U = keep_mask(12, list(range(8)))
    problem = split_problem(3, path=path)
    assert problem.held_out is not None
    alone = SOLVERS.get("least-squares").solve(replace(problem, held_out_by_text=[problem.held_out]), keep_U)
    together = SOLVERS.get("least-squares").solve(problem, keep_U)
    assert alone.statistics == together.statistics
    assert torch.equal(alone.weight_OK, together.weight_OK)


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_mixtures_of_outputs_choose_for_the_worst_text_as_all_outputs_do(
    seed: int, path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_U = keep_mask(12, [0, 2, 3, 5, 7, 8, 11])
    whole = replace(split_problem(9, path=path, seed=seed, scale_O=[30.0] * 2 + [1.0] * 38), seed=seed)
    problem, _, _ = by_texts(whole, (2.0, 0.3, 0.1), seed)
    exact = judged_least_squares(problem, keep_U).statistics["held_out_error"]
    monkeypatch.setattr(least_squares, "SKETCH_ROWS", 16)
    mixed = judged_least_squares(problem, keep_U).statistics["held_out_error"]
    assert exact * (1 - 1e-9) <= mixed <= exact * 1.05
