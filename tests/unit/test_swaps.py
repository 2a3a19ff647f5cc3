"""Exchanges after greedy removal: exact objectives, never worse, locally optimal, by brute force in float64.

Shape suffixes: T tokens, O outputs, I inputs, U units, K kept inputs, C candidate sets.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from structprune.errors import NumericalError
from structprune.linalg.obs import (
    _sweep,  # pyright: ignore[reportPrivateUsage]
    _swept,  # pyright: ignore[reportPrivateUsage]
    greedy_removal,
    metric_root,
    swap_units,
)
from structprune.scores.selection import keep_greedy, keep_swapped
from structprune.types import LayerProblem, Moments


def random_inputs(num_inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated tokens; the last rows are the ridge, so that x^T x is the damped Gram."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(200, num_inputs, generator=generator, dtype=torch.float64) @ mixing_II
    weight_OI = torch.randn(5, num_inputs, generator=generator, dtype=torch.float64)
    return weight_OI, torch.cat([x_TI, torch.eye(num_inputs, dtype=torch.float64)])


def brute_force(weight_OI: Tensor, x_TI: Tensor, keep_U: Tensor, width: int) -> float:
    """Half the smallest squared error of W x from the kept inputs only."""
    y_TO = x_TI @ weight_OI.T
    x_TK = x_TI[:, keep_U.repeat_interleave(width)]
    fitted_TO = x_TK @ torch.linalg.lstsq(x_TK, y_TO, driver="gelsd").solution
    return 0.5 * float((fitted_TO - y_TO).square().sum())


def greedy_mask(weight_OI: Tensor, gram_II: Tensor, num_keep: int, width: int = 1) -> Tensor:
    keep_U = torch.ones(weight_OI.shape[1] // width, dtype=torch.bool)
    path = greedy_removal(weight_OI.clone(), torch.linalg.inv(gram_II), len(keep_U) - num_keep, width=width)
    keep_U[path.order] = False
    return keep_U


def mask(num_units: int, *kept: int) -> Tensor:
    keep_U = torch.zeros(num_units, dtype=torch.bool)
    keep_U[list(kept)] = True
    return keep_U


def exchanges(keep_U: Tensor) -> list[Tensor]:
    """All masks that differ by one kept and one removed unit."""
    masks: list[Tensor] = []
    for kept, removed in product(keep_U.nonzero().flatten().tolist(), (~keep_U).nonzero().flatten().tolist()):
        moved_U = keep_U.clone()
        moved_U[kept], moved_U[removed] = False, True
        masks.append(moved_U)
    return masks


def make_problem(num_units: int, width: int, *, sensitivity: bool, target: bool = False, seed: int = 0) -> LayerProblem:
    weight_OI, x_TI = random_inputs(num_units * width, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    gradient_TO = torch.randn(50, 5, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 3, 1, 1, 0.1])
    gram_II = x_TI.T @ x_TI
    noise_OI = torch.randn(weight_OI.shape, generator=generator, dtype=torch.float64)
    target_OI = weight_OI @ gram_II + 50 * noise_OI if target else None
    return LayerProblem(
        weight_OI=weight_OI,
        fit=Moments(gram_II=gram_II, num_tokens=len(x_TI), target_OI=target_OI),
        width=width,
        damping=1e-3,
        producer_norms_MU=torch.ones(1, num_units),
        sensitivity_OO=gradient_TO.T @ gradient_TO / 50 if sensitivity else None,
    )


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("max_exchange", [1, 2, 4])
@pytest.mark.parametrize("with_metric", [False, True])
def test_objectives_equal_brute_force(width: int, max_exchange: int, with_metric: bool) -> None:
    weight_OI, x_TI = random_inputs(10 * width, seed=1)
    if with_metric:
        root_OO = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        weight_OI = metric_root(root_OO @ root_OO.T).T @ weight_OI
    start_U = mask(10, 0, 1, 2, 3, 4)
    objectives: list[float] = []
    for max_rounds in range(6):
        swapped = swap_units(
            weight_OI, x_TI.T @ x_TI, start_U, width=width, max_exchange=max_exchange, max_rounds=max_rounds
        )
        assert swapped.objective_before == pytest.approx(brute_force(weight_OI, x_TI, start_U, width), rel=1e-9)
        assert swapped.objective_after == pytest.approx(brute_force(weight_OI, x_TI, swapped.keep_U, width), rel=1e-9)
        objectives.append(swapped.objective_after)
        assert swapped.num_rounds <= max_rounds
        assert int(swapped.keep_U.sum()) == 5
        assert (swapped.objective_after < swapped.objective_before) == (not torch.equal(swapped.keep_U, start_U))
    assert min(objectives) < 0.95 * max(objectives)
    assert objectives == sorted(objectives, reverse=True)


def test_metric_objective_is_the_loss() -> None:
    """1/2 tr(F D H D^T) is the objective of L^T W with F = L L^T: V from lstsq without the metric, then weighed."""
    weight_OI, x_TI = random_inputs(8, seed=3)
    root_OO = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    factor_OO = metric_root(root_OO @ root_OO.T)
    swapped = swap_units(factor_OO.T @ weight_OI, x_TI.T @ x_TI, mask(8, 0, 1, 2))
    difference_OI = weight_OI.clone()
    fitted_KO = torch.linalg.lstsq(x_TI[:, swapped.keep_U], x_TI @ weight_OI.T, driver="gelsd").solution
    difference_OI[:, swapped.keep_U] -= fitted_KO.T
    expected = 0.5 * torch.trace(factor_OO @ factor_OO.T @ difference_OI @ x_TI.T @ x_TI @ difference_OI.T)
    assert swapped.objective_after == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("width", [1, 3])
def test_sweeps_keep_the_state_exact(width: int) -> None:
    """After forty sets have come and gone, the state is that of a new factorisation, and the changes add up."""
    weight_OI, x_TI = random_inputs(9 * width, seed=5)
    gram_II = x_TI.T @ x_TI
    keep_U = mask(9, 0, 2, 4, 6)
    values_OI, table_II, objective = _swept(weight_OI, gram_II, keep_U, width)
    generator = torch.Generator().manual_seed(6)
    for _ in range(40):
        wanted_U = torch.rand(9, generator=generator) < 0.5
        change = _sweep(values_OI, table_II, wanted_U & ~keep_U, width, sign=1)
        assert change <= 0
        objective += change
        change = _sweep(values_OI, table_II, keep_U & ~wanted_U, width, sign=-1)
        assert change >= 0
        objective += change
        keep_U = wanted_U
        expected = _swept(weight_OI, gram_II, keep_U, width)
        torch.testing.assert_close(values_OI, expected[0], rtol=1e-8, atol=1e-7)
        torch.testing.assert_close(table_II, expected[1], rtol=1e-8, atol=1e-7)
        assert objective == pytest.approx(expected[2], rel=1e-8, abs=1e-7)
    torch.testing.assert_close(table_II, table_II.T)


def test_finds_the_optimum_more_often_than_greedy() -> None:
    """Ten units, five stay, 60 seeds: greedy finds the best of all 252 sets 28 times, with exchanges 47."""
    sets_CK = torch.tensor(list(combinations(range(10), 5)))
    found_greedy = found_swapped = 0
    for seed in range(60):
        weight_OI, x_TI = random_inputs(10, seed)
        gram_II = x_TI.T @ x_TI
        swapped = swap_units(weight_OI, gram_II, greedy_mask(weight_OI, gram_II, 5))
        assert swapped.objective_after <= swapped.objective_before
        cross_CKO = (gram_II @ weight_OI.T)[sets_CK]
        solved_CKO = torch.linalg.solve(gram_II[sets_CK[:, :, None], sets_CK[:, None, :]], cross_CKO)
        energy = (weight_OI @ gram_II * weight_OI).sum()
        best = 0.5 * float((energy - (cross_CKO * solved_CKO).sum(dim=(1, 2))).min())
        assert swapped.objective_after >= best * (1 - 1e-9)
        found_greedy += swapped.objective_before <= best * (1 + 1e-9)
        found_swapped += swapped.objective_after <= best * (1 + 1e-9)
    assert found_greedy <= 32
    assert found_swapped >= 42


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("max_exchange", [1, 3])
def test_ends_in_a_local_optimum(width: int, max_exchange: int) -> None:
    for seed in range(4):
        weight_OI, x_TI = random_inputs(9 * width, seed)
        swapped = swap_units(weight_OI, x_TI.T @ x_TI, mask(9, 0, 1, 2, 3), width=width, max_exchange=max_exchange)
        nearby = [brute_force(weight_OI, x_TI, keep_U, width) for keep_U in exchanges(swapped.keep_U)]
        assert len(nearby) == 20
        assert swapped.objective_after <= min(nearby) * (1 + 1e-8)


@pytest.mark.parametrize("width", [1, 3])
def test_one_exchange_is_the_best_of_all(width: int) -> None:
    weight_OI, x_TI = random_inputs(9 * width, seed=7)
    start_U = mask(9, 0, 1, 2, 3, 4)
    swapped = swap_units(weight_OI, x_TI.T @ x_TI, start_U, width=width, max_exchange=1, max_rounds=1)
    prices = [brute_force(weight_OI, x_TI, keep_U, width) for keep_U in exchanges(start_U)]
    assert swapped.objective_after == pytest.approx(min(prices), rel=1e-9)
    assert swapped.num_rounds == 1


def test_one_exchange_mends_what_greedy_broke() -> None:
    """y = x_0 + x_1 and x_2 is that plus a little noise: greedy drops x_2 for nothing and then loses half of y."""
    weight_OI = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    gram_II = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 2.01]], dtype=torch.float64)
    greedy_U = greedy_mask(weight_OI, gram_II, 1)
    assert greedy_U.tolist() == [False, True, False]
    swapped = swap_units(weight_OI, gram_II, greedy_U)
    assert swapped.keep_U.tolist() == [False, False, True]
    assert swapped.objective_before == pytest.approx(0.5)
    assert swapped.objective_after == pytest.approx(0.5 * (2 - 4 / 2.01))
    assert greedy_U.tolist() == [False, True, False]


def test_exchanges_two_at_once() -> None:
    """Two outputs, each the sum of three inputs with a noisy copy of the sum beside them: one move puts both right."""
    block_II = torch.eye(4, dtype=torch.float64)
    block_II[3, :3] = block_II[:3, 3] = 1.0
    block_II[3, 3] = 3.01
    weight_OI = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0]], dtype=torch.float64)
    gram_II = torch.block_diag(block_II, block_II)
    swapped = swap_units(weight_OI, gram_II, mask(8, 2, 6), max_rounds=1)
    assert torch.equal(swapped.keep_U, mask(8, 3, 7))
    assert swapped.objective_after == pytest.approx(3 - 9 / 3.01)


@pytest.mark.parametrize("max_exchange", [1, 64])
def test_equal_units_stay_where_they_are(max_exchange: int) -> None:
    """No exchange of equals lowers the objective; of several equal exchanges the lower numbers are taken."""
    weight_OI, gram_II = torch.ones(2, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    start_U = mask(6, 1, 3, 5)
    swapped = swap_units(weight_OI, gram_II, start_U, max_exchange=max_exchange)
    assert torch.equal(swapped.keep_U, start_U)
    assert swapped.objective_after == swapped.objective_before == 3.0
    weight_OI[:, [2, 4]] = 2.0
    swapped = swap_units(weight_OI, gram_II, start_U, max_exchange=max_exchange, max_rounds=1)
    assert swapped.keep_U.tolist() == ([False, False, True, True, False, True] if max_exchange == 1 else
                                       [False, False, True, False, True, True])  # fmt: skip


@pytest.mark.parametrize("width", [1, 3])
def test_nothing_to_exchange(width: int) -> None:
    weight_OI, x_TI = random_inputs(4 * width, seed=8)
    gram_II = x_TI.T @ x_TI
    everything = swap_units(weight_OI, gram_II, mask(4, 0, 1, 2, 3), width=width)
    assert everything.keep_U.all()
    assert (everything.objective_before, everything.objective_after, everything.num_rounds) == (0.0, 0.0, 0)
    nothing = swap_units(weight_OI, gram_II, mask(4), width=width)
    assert not nothing.keep_U.any()
    energy = 0.5 * float((x_TI @ weight_OI.T).square().sum())
    assert nothing.objective_before == nothing.objective_after == pytest.approx(energy, rel=1e-12)
    assert nothing.num_rounds == 0


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("num_keep", [1, 4])
def test_one_against_the_rest_is_exhaustive(width: int, num_keep: int) -> None:
    """Where one unit stays or one leaves, single exchanges reach every set."""
    weight_OI, x_TI = random_inputs(5 * width, seed=9)
    prices = [brute_force(weight_OI, x_TI, mask(5, *kept), width) for kept in combinations(range(5), num_keep)]
    for kept in combinations(range(5), num_keep):
        swapped = swap_units(weight_OI, x_TI.T @ x_TI, mask(5, *kept), width=width)
        assert swapped.objective_after == pytest.approx(min(prices), rel=1e-9)


def test_leaves_its_arguments_alone() -> None:
    weight_OI, x_TI = random_inputs(8, seed=10)
    gram_II, keep_U = x_TI.T @ x_TI, mask(8, 0, 1, 2)
    before = weight_OI.clone(), gram_II.clone(), keep_U.clone()
    swapped = swap_units(weight_OI, gram_II, keep_U)
    assert not torch.equal(swapped.keep_U, keep_U)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight_OI, gram_II, keep_U), strict=True))


def test_indefinite_gram_is_an_error() -> None:
    weight_OI = torch.ones(1, 4, dtype=torch.float64)
    with pytest.raises(NumericalError, match="kept units is not positive definite"):
        swap_units(weight_OI, -torch.eye(4, dtype=torch.float64), mask(4, 0, 1))
    indefinite_II = torch.diag(torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64))
    with pytest.raises(NumericalError, match="while units were exchanged"):
        swap_units(weight_OI, indefinite_II, mask(4, 0, 1))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("sensitivity", [False, True])
@pytest.mark.parametrize("target", [False, True])
def test_selector_is_never_worse_than_greedy(width: int, sensitivity: bool, target: bool) -> None:
    """Measured apart from the selector: V by the ridge's normal equations, its rise over no removal, in the metric."""
    improved = 0
    for seed in range(12):
        problem = make_problem(12, width, sensitivity=sensitivity, target=target, seed=seed)
        damped_II = problem.fit.gram_II.clone()
        damped_II.diagonal().add_(problem.damping * float(problem.fit.gram_II.diagonal().mean()))
        cross_OI = (
            problem.weight_OI @ problem.fit.gram_II if problem.fit.target_OI is None else problem.fit.target_OI
        ) + problem.weight_OI @ (damped_II - problem.fit.gram_II)
        full_OI = torch.linalg.solve(damped_II, cross_OI.T).T
        root_OO = torch.eye(5, dtype=torch.float64)
        if problem.sensitivity_OO is not None:
            root_OO = metric_root(problem.sensitivity_OO)
        objectives: list[float] = []
        for keep_U in (keep_greedy(problem, 6), keep_swapped(problem, 6)):
            assert int(keep_U.sum()) == 6
            kept_K = problem.kept_inputs(keep_U)
            difference_OI = -full_OI
            difference_OI[:, kept_K] += torch.linalg.solve(damped_II[kept_K][:, kept_K], cross_OI[:, kept_K].T).T
            weighed_OI = root_OO.T @ difference_OI
            objectives.append(float((weighed_OI @ damped_II * weighed_OI).sum()))
        assert objectives[1] <= objectives[0] * (1 + 1e-9)
        improved += objectives[1] < objectives[0] * (1 - 1e-6)
    assert improved >= 3


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("num_keep", [1, 5, 11, 12])
def test_selector_is_deterministic_and_permutation_equivariant(width: int, num_keep: int) -> None:
    problem = make_problem(12, width, sensitivity=True, seed=11)
    keep_U = keep_swapped(problem, num_keep)
    assert int(keep_U.sum()) == num_keep
    assert torch.equal(keep_U, keep_swapped(problem, num_keep))
    order_U = torch.randperm(12, generator=torch.Generator().manual_seed(12))
    order_I = (order_U[:, None] * width + torch.arange(width)).flatten()
    permuted = replace(problem, weight_OI=problem.weight_OI[:, order_I], fit=problem.fit.reordered(order_I))
    assert torch.equal(keep_swapped(permuted, num_keep), keep_U[order_U])
