"""Greedy removal with downdates: each step is exact, by brute force in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structprune.linalg.obs import greedy_removal, group_costs, metric_root
from structprune.scores import SCORES
from structprune.scores.selection import removal_path
from structprune.types import LayerProblem, Moments


def random_problem(num_inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(200, num_inputs, generator=generator, dtype=torch.float64) @ torch.randn(
        num_inputs, num_inputs, generator=generator, dtype=torch.float64
    )
    hessian_II = x_TI.T @ x_TI + torch.eye(num_inputs, dtype=torch.float64)
    return torch.randn(5, num_inputs, generator=generator, dtype=torch.float64), hessian_II


def best_without(weight_OI: Tensor, hessian_II: Tensor, removed: list[int]) -> float:
    """min over V, removed columns zero, of 1/2 tr((V - W) H (V - W)^T), by solving the normal equations anew."""
    kept = [i for i in range(weight_OI.shape[1]) if i not in removed]
    value = torch.zeros_like(weight_OI)
    value[:, kept] = weight_OI @ hessian_II[:, kept] @ torch.linalg.inv(hessian_II[kept][:, kept])
    difference = value - weight_OI
    return 0.5 * float((difference @ hessian_II * difference).sum())


@pytest.mark.parametrize("width", [1, 2, 3])
def test_scores_equal_brute_force(width: int) -> None:
    weight_OI, hessian_II = random_problem(6)
    costs = group_costs(weight_OI, torch.linalg.inv(hessian_II), width)
    for unit in range(6 // width):
        expected = best_without(weight_OI, hessian_II, list(range(unit * width, (unit + 1) * width)))
        assert float(costs[unit]) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("step", [1, 3])
def test_costs_add_up_to_the_joint_optimum(width: int, step: int) -> None:
    weight_OI, hessian_II = random_problem(12, seed=1)
    path = greedy_removal(weight_OI.clone(), torch.linalg.inv(hessian_II), 9 // width, width=width, units_per_step=step)
    removed = [int(u) * width + i for u in path.order for i in range(width)]
    assert len(set(removed)) == len(removed)
    assert float(path.cost.sum()) == pytest.approx(best_without(weight_OI, hessian_II, removed), rel=1e-7)


def test_each_step_takes_the_cheapest() -> None:
    weight_OI, hessian_II = random_problem(10, seed=2)
    path = greedy_removal(weight_OI.clone(), torch.linalg.inv(hessian_II), 6)
    removed: list[int] = []
    for unit in path.order.tolist():
        prices = {i: best_without(weight_OI, hessian_II, [*removed, i]) for i in range(10) if i not in removed}
        assert prices[unit] == pytest.approx(min(prices.values()), rel=1e-7)
        removed.append(unit)


@pytest.mark.parametrize(("width", "step"), [(1, 1), (2, 1), (1, 4)])
def test_partitions_lose_as_many_in_every_step(width: int, step: int) -> None:
    """The cheapest of each run of four units, at the prices before the step; costs are exact for what is gone."""
    weight_OI, hessian_II = random_problem(12 * width, seed=5)
    inverse_II = torch.linalg.inv(hessian_II)
    path = greedy_removal(weight_OI.clone(), inverse_II, 9, width=width, units_per_step=step, partitions=3)
    removed: list[int] = []
    for chosen in path.order.reshape(3, 3).tolist():
        assert [unit // 4 for unit in chosen] == [0, 1, 2]
        for unit in chosen:
            prices: dict[int, float] = {}
            for other in range(unit // 4 * 4, unit // 4 * 4 + 4):
                if other not in removed:
                    columns = [u * width + i for u in (*removed, other) for i in range(width)]
                    prices[other] = best_without(weight_OI, hessian_II, columns)
            assert prices[unit] == pytest.approx(min(prices.values()), rel=1e-7)
        removed += chosen
    columns = [unit * width + i for unit in removed for i in range(width)]
    assert float(path.cost.sum()) == pytest.approx(best_without(weight_OI, hessian_II, columns), rel=1e-7)


def test_metric_prices_the_loss() -> None:
    weight_OI, hessian_II = random_problem(8, seed=3)
    root = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    sensitivity_OO = root @ root.T
    factor = metric_root(sensitivity_OO, damping=1e-12)
    torch.testing.assert_close(factor @ factor.T, sensitivity_OO, rtol=1e-6, atol=1e-6)
    problem = LayerProblem(
        weight_OI=weight_OI,
        fit=Moments(gram_II=hessian_II, num_tokens=1),
        width=1,
        damping=1e-12,
        producer_norms_MU=torch.ones(1, 8),
        sensitivity_OO=sensitivity_OO,
    )
    for unit in range(8):
        kept = [i for i in range(8) if i != unit]
        value = torch.zeros_like(weight_OI)
        value[:, kept] = weight_OI @ hessian_II[:, kept] @ torch.linalg.inv(hessian_II[kept][:, kept])
        difference = value - weight_OI
        root = metric_root(sensitivity_OO)
        expected = 0.5 * float(torch.trace(root @ root.T @ difference @ hessian_II @ difference.T))
        assert float(SCORES.get("loss").score(problem)[unit]) == pytest.approx(expected, rel=1e-6)
    assert float(removal_path(problem, 1).cost[0]) == pytest.approx(
        float(SCORES.get("loss").score(problem).min()), rel=1e-9
    )


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_everything_can_be_removed(width: int) -> None:
    """Up to the last unit, where rounding must not make a removed group of columns look alive."""
    for seed in range(10):
        weight_OI, hessian_II = random_problem(12 * width, seed)
        path = greedy_removal(weight_OI.clone(), torch.linalg.inv(hessian_II), 12, width=width)
        assert path.order.sort().values.tolist() == list(range(12))
        expected = best_without(weight_OI, hessian_II, list(range(12 * width)))
        assert float(path.cost.sum()) == pytest.approx(expected, rel=1e-6)
