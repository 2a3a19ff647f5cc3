"""Learners of gates by themselves: budgets, toys with a known best choice, and estimates without bias.

Shape suffixes: U units of all sublayers, W true cost of every unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structprune.allocation import ALLOCATORS, AllocationOptions, BlockBudget
from structprune.allocation.gates import GATES, GateLearner, GateProblem, gates_of
from structprune.allocation.gates.bypass import loss_slope
from structprune.allocation.gates.gate import gate_problem
from structprune.errors import InputError, NumericalError

LEARNERS = list(GATES)
BY_GRADIENT = [name for name in LEARNERS if GATES.get(name).uses_gradient]
NUM_STEPS = 80
OPTIONS = AllocationOptions(sparsity=0.4)


def budgets_of(sizes: Sequence[int] = (1, 1, 3), num_units: int = 40, multiple_of: int = 1) -> list[BlockBudget]:
    generator = torch.Generator().manual_seed(8)
    found: list[BlockBudget] = []
    for block, size in enumerate(sizes):
        price_U = torch.rand(num_units, generator=generator, dtype=torch.float64).add(0.05).sort().values * size
        found.append(
            BlockBudget(
                block=block,
                kind="mlp",
                num_units=num_units,
                unit_size=size,
                module_size=num_units * size,
                multiple_of=multiple_of,
                cost_U=price_U,
            )
        )
    return found


def problem_of(
    *,
    sizes: Sequence[int] = (1, 1, 3),
    num_units: int = 40,
    keeps_widths: bool = False,
    multiple_of: int = 1,
    options: AllocationOptions = OPTIONS,
) -> GateProblem:
    budgets = budgets_of(sizes, num_units, multiple_of)
    kept = ALLOCATORS.get("closed-form").allocate(budgets, options)
    return gate_problem(budgets, options, kept, keeps_widths=keeps_widths, num_steps=NUM_STEPS, seed=3)


def removed(problem: GateProblem, keep_U: Tensor) -> int:
    return int(problem.size_U[~keep_U].sum())


def check_choice(problem: GateProblem, keep_U: Tensor) -> None:
    """The budget is met to less than a step of one sublayer, and units far from the threshold are where they were."""
    largest = max(budget.unit_size * budget.multiple_of for budget in problem.budgets)
    assert problem.target <= removed(problem, keep_U) < problem.target + largest
    assert torch.equal(keep_U[~problem.free_U], problem.start_U[~problem.free_U] > 0)
    for budget, part in zip(problem.budgets, problem.parts(keep_U), strict=True):
        assert int(part.sum()) % budget.multiple_of == 0


def test_the_start_is_what_the_allocator_chose() -> None:
    problem = problem_of()
    kept = ALLOCATORS.get("closed-form").allocate(problem.budgets, AllocationOptions(sparsity=0.4))
    parts = problem.parts(problem.stays_U)
    assert [int(part.sum()) for part in parts] == kept
    # In order of removal: the first ones are gone.
    assert all(torch.equal(part, torch.arange(40) >= 40 - keep) for part, keep in zip(parts, kept, strict=True))
    share = float(problem.free_U.double().mean())
    assert 0.2 < share < 0.4
    inside_U = problem.start_U[problem.free_U]
    assert float(inside_U.abs().max()) <= 1
    assert float(problem.start_U[~problem.free_U].abs().min()) > 1


@given(seed=st.integers(0, 10_000), multiple_of=st.sampled_from([1, 4]))
@settings(max_examples=40, deadline=None)
def test_every_choice_meets_the_budget(seed: int, multiple_of: int) -> None:
    problem = problem_of(multiple_of=multiple_of)
    score_U = torch.randn(len(problem.start_U), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    check_choice(problem, problem.keep(3 * score_U))


def test_a_sublayer_that_is_protected_keeps_all() -> None:
    problem = problem_of(options=AllocationOptions(sparsity=0.3, protected=frozenset({1})))
    score_U = torch.linspace(3, -3, len(problem.start_U), dtype=torch.float64)
    assert bool(problem.parts(problem.keep(score_U))[1].all())
    assert not bool(problem.parts(problem.free_U)[1].any())


def test_widths_can_be_kept() -> None:
    problem = problem_of(keeps_widths=True)
    score_U = torch.randn(len(problem.start_U), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before, after = (problem.parts(choice) for choice in (problem.stays_U, problem.keep(score_U)))
    assert [int(part.sum()) for part in before] == [int(part.sum()) for part in after]
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_costs_that_are_not_finite() -> None:
    budgets = budgets_of()
    budgets[1] = replace(budgets[1], cost_U=torch.full((40,), torch.nan))
    with pytest.raises(NumericalError, match="a removal cost is not finite"):
        gate_problem(budgets, AllocationOptions(sparsity=0.4), [20] * 3, keeps_widths=False, num_steps=1, seed=0)


def true_costs(problem: GateProblem, seed: int = 5) -> Tensor:
    """The price of every unit as it was measured, times a factor that the measurement does not know."""
    generator = torch.Generator().manual_seed(seed)
    cost_U = torch.cat([budget.cost_U for budget in problem.budgets if budget.cost_U is not None])
    return cost_U * torch.exp(0.8 * torch.randn(len(cost_U), generator=generator, dtype=torch.float64))


def loss_of(cost_U: Tensor, gate_U: Tensor) -> float:
    return float((cost_U * (1 - gate_U)).sum())


def best_choice(problem: GateProblem, cost_U: Tensor) -> Tensor:
    """The units that stay by true cost per parameter, among those that may change."""
    value_U = (cost_U / problem.size_U).log()
    low, high = value_U[problem.free_U].aminmax()
    return problem.keep(2 * (value_U - low) / (high - low) - 1)


def trained(problem: GateProblem, name: str, cost_U: Tensor, num_steps: int = NUM_STEPS) -> GateLearner:
    learner = GATES.get(name).start(problem)
    for number in range(num_steps):
        losses = [loss_of(cost_U, gate_U) for gate_U in learner.masks()]
        for gate_U in learner.masks():
            assert float(gate_U.min()) >= 0
            assert float(gate_U.max()) <= 1
        check_choice(problem, learner.keep())
        learner.step(-cost_U if GATES.get(name).uses_gradient else None, losses, 1 - number / NUM_STEPS)
    return learner


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_the_best_choice_of_a_separable_toy(name: str) -> None:
    """The loss is a sum over the units that are gone: what is best is known, and the start is not that."""
    problem = problem_of(sizes=(1, 1, 1), keeps_widths=GATES.get(name).keeps_widths)
    cost_U = true_costs(problem)
    best_U = best_choice(problem, cost_U)
    start, best = (loss_of(cost_U, choice.double()) for choice in (problem.stays_U, best_U))
    learner = trained(problem, name, cost_U)
    found = loss_of(cost_U, learner.keep().double())
    assert best < 0.9 * start
    assert found - best < 0.02 * (start - best)


@pytest.mark.parametrize("name", [name for name in BY_GRADIENT if name in ("graspprune", "ddp")])
def test_units_of_different_sizes(name: str) -> None:
    problem = problem_of(sizes=(1, 1, 3), num_units=200)
    cost_U = true_costs(problem)
    start, best = (loss_of(cost_U, c.double()) for c in (problem.stays_U, best_choice(problem, cost_U)))
    found = loss_of(cost_U, trained(problem, name, cost_U).keep().double())
    assert found - best < 0.05 * (start - best)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_goes_on_from_its_state(name: str) -> None:
    problem = problem_of(keeps_widths=GATES.get(name).keeps_widths)
    cost_U = true_costs(problem)
    whole = trained(problem, name, cost_U, 9)
    first, second = trained(problem, name, cost_U, 4), GATES.get(name).start(problem)
    second.state = {entry: tensor.clone() for entry, tensor in first.state.items()}
    for number in range(4, 9):
        losses = [loss_of(cost_U, gate_U) for gate_U in second.masks()]
        second.step(-cost_U if GATES.get(name).uses_gradient else None, losses, 1 - number / NUM_STEPS)
    assert second.state.keys() == whole.state.keys()
    assert all(torch.equal(second.state[entry], tensor) for entry, tensor in whole.state.items())


@pytest.mark.parametrize("name", LEARNERS)
def test_nothing_to_learn(name: str) -> None:
    """All units stay: no unit may change sides."""
    budgets, options = budgets_of(), AllocationOptions(sparsity=0.0)
    problem = gate_problem(budgets, options, [40] * 3, keeps_widths=True, num_steps=2, seed=0)
    learner = GATES.get(name).start(problem)
    learner.step(
        -torch.ones(120, dtype=torch.float64) if GATES.get(name).uses_gradient else None,
        [1.0] * len(learner.masks()),
        1.0,
    )
    assert bool(learner.keep().all())


def test_the_estimate_of_bypass_has_no_bias() -> None:
    """Over all pairs of masks of three units, each with its chance, for a loss that is no sum over units."""
    chance_U = torch.tensor([0.3, 0.6, 0.85], dtype=torch.float64, requires_grad=True)
    masks = [torch.tensor(bits, dtype=torch.float64) for bits in itertools.product((0.0, 1.0), repeat=3)]

    def loss(mask_U: Tensor) -> float:
        a, b, c = mask_U.tolist()
        return 2.0 - a + 0.5 * b - 1.5 * a * b * c + 0.7 * (1 - b) * c

    def chance(mask_U: Tensor) -> Tensor:
        return torch.where(mask_U > 0, chance_U, 1 - chance_U).prod()

    exact_U = torch.autograd.grad(sum(chance(mask) * loss(mask) for mask in masks), chance_U)[0]  # type: ignore[arg-type]
    fixed_U = chance_U.detach()
    mean_U = torch.zeros(3, dtype=torch.float64)
    for first, second in itertools.product(masks, repeat=2):
        weight = chance(first) * chance(second)
        mean_U += weight.detach() * loss_slope(fixed_U, [first, second], [loss(first), loss(second)])
    torch.testing.assert_close(mean_U, exact_U)


def test_bypass_comes_nearer_and_keeps_the_budget_on_average() -> None:
    problem = replace(problem_of(sizes=(1, 1, 1)), num_steps=600)
    cost_U = true_costs(problem)
    learner = GATES.get("bypass").start(problem)
    kept = float((problem.size_U * problem.stays_U).sum())
    for number in range(600):
        learner.step(None, [loss_of(cost_U, gate_U) for gate_U in learner.masks()], 1 - number / 600)
        chance_U = learner.state["chance"]
        assert float((chance_U * problem.size_U).sum()) == pytest.approx(kept, abs=1e-6)
        assert float(chance_U[problem.free_U].min()) >= 0.02
    check_choice(problem, learner.keep())
    start, best = (loss_of(cost_U, c.double()) for c in (problem.stays_U, best_choice(problem, cost_U)))
    assert loss_of(cost_U, learner.keep().double()) < start - 0.3 * (start - best)


def test_names() -> None:
    assert gates_of("none") is None
    assert gates_of("graspprune") is GATES.get("graspprune")
    with pytest.raises(InputError, match="unknown gate learner 'graspprun'"):
        gates_of("graspprun")
