"""Every score and selector: a number or a verdict per unit, indifferent to the units' order; weights of zero go first.

Shape suffixes: T tokens, O outputs, I inputs, U units.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from structprune.scores import SCORES, SELECTORS, Selector, score_or_selector
from structprune.scores.selection import ascending, keep_best, removal_path, shrunk_gram
from structprune.solvers import SOLVERS
from structprune.types import LayerProblem, Moments, TaylorSums

TAYLOR = [name for name in SCORES if "gradients" in SCORES.get(name).reads]
# Scores that depend on the problem's numbers.
READING = [name for name in SCORES if name != "random"]


def make_problem(num_units: int, width: int, dtype: torch.dtype = torch.float32) -> LayerProblem:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(40, num_units * width, generator=generator)
    gradient_TO = torch.randn(40, 5, generator=generator)
    return LayerProblem(
        weight_OI=torch.randn(5, num_units * width, generator=generator).to(dtype),
        fit=Moments(gram_II=x_TI.T @ x_TI, num_tokens=40, sum_I=x_TI.double().sum(dim=0)),
        width=width,
        damping=1e-4,
        producer_norms_MU=torch.rand(1, num_units, generator=generator) + 0.5,
        sensitivity_OO=gradient_TO.T @ gradient_TO / 40,
        taylor=TaylorSums(
            signed_U=torch.randn(num_units, generator=generator, dtype=torch.float64),
            first_U=torch.rand(num_units, generator=generator, dtype=torch.float64) + 0.5,
            second_U=torch.rand(num_units, generator=generator, dtype=torch.float64) + 0.5,
            mixed_U=torch.rand(num_units, generator=generator, dtype=torch.float64) + 0.5,
        ),
    )


def sums_of(problem: LayerProblem) -> dict[str, Tensor]:
    assert problem.taylor is not None
    return {field.name: getattr(problem.taylor, field.name) for field in fields(TaylorSums)}


def by_hand(width: int, producer_norms_U: Tensor) -> LayerProblem:
    """A 2 x 3 consumer; four tokens with input norms 2, 3 and 4, so root mean squares of 1, 1.5 and 2."""
    return LayerProblem(
        weight_OI=torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]]),
        fit=Moments(gram_II=torch.tensor([[4.0, 0.5, -1.0], [0.5, 9.0, 2.0], [-1.0, 2.0, 16.0]]), num_tokens=4),
        width=width,
        damping=1e-4,
        producer_norms_MU=producer_norms_U[None],
    )


@pytest.mark.parametrize("name", list(SCORES))
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_finite_number_per_unit(name: str, width: int, dtype: torch.dtype) -> None:
    score_U = SCORES.get(name).score(make_problem(6, width, dtype))
    assert score_U.shape == (6,)
    assert score_U.dtype in (torch.float32, torch.float64)
    assert torch.isfinite(score_U).all()
    assert score_U.unique().numel() == 6


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("width", [1, 4])
def test_permutation_equivariant(name: str, width: int) -> None:
    problem = make_problem(6, width)
    order_U = torch.tensor([3, 5, 0, 1, 4, 2])
    order_I = (order_U[:, None] * width + torch.arange(width)).flatten()
    permuted = replace(
        problem,
        weight_OI=problem.weight_OI[:, order_I],
        fit=problem.fit.reordered(order_I),
        producer_norms_MU=problem.producer_norms_MU[:, order_U],
        taylor=TaylorSums(**{field: sum_U[order_U] for field, sum_U in sums_of(problem).items()}),
    )
    score = SCORES.get(name).score
    torch.testing.assert_close(score(permuted), score(problem)[order_U], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [*SCORES, *SELECTORS])
@pytest.mark.parametrize("part", ["gram", "sums", "gradients", "sensitivity"])
def test_depends_on_what_it_says_that_it_reads(name: str, part: str) -> None:
    problem = make_problem(6, 1)
    order_U, scale_I = torch.tensor([4, 5, 0, 1, 2, 3]), torch.tensor([1.0, 9, 1, 9, 1, 9])
    fit, sums = problem.fit, {field: sum_U[order_U] for field, sum_U in sums_of(problem).items()}
    changed = {
        "gram": replace(problem, fit=replace(fit, gram_II=fit.gram_II * torch.outer(scale_I, scale_I))),
        "sums": replace(problem, fit=replace(fit, sum_I=torch.arange(6, dtype=torch.float64))),
        "gradients": replace(problem, taylor=TaylorSums(**sums)),
        "sensitivity": replace(problem, sensitivity_OO=torch.diag(torch.arange(1.0, 6.0))),
    }[part]
    entry = score_or_selector(name)
    if isinstance(entry, Selector):
        same = torch.equal(entry.keep(problem, 3), entry.keep(changed, 3))
        # Selectors weigh errors by the sensitivity where there is one, and do without it.
        assert same == (part not in entry.reads) or part == "sensitivity"
    else:
        assert torch.equal(entry.score(problem), entry.score(changed)) == (part not in entry.reads)


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("width", [1, 4])
def test_unit_without_weights_scores_zero(name: str, width: int) -> None:
    problem = make_problem(6, width)
    problem.weight_OI[:, 2 * width : 3 * width] = 0
    problem.producer_norms_MU[:, 2] = 0
    for sum_U in sums_of(problem).values():
        sum_U[2] = 0
    score_U = SCORES.get(name).score(problem)
    assert score_U[2] == 0
    assert score_U.ne(0).sum() == 5


@pytest.mark.parametrize("name", list(SCORES))
def test_leaves_the_problem_alone(name: str) -> None:
    problem = make_problem(6, 2)
    before = problem.weight_OI.clone(), problem.fit.gram_II.clone(), problem.producer_norms_MU.clone()
    SCORES.get(name).score(problem)
    after = problem.weight_OI, problem.fit.gram_II, problem.producer_norms_MU
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_wanda_by_hand() -> None:
    score_U = SCORES.get("wanda").score(by_hand(1, torch.ones(3)))
    torch.testing.assert_close(score_U, torch.tensor([5 * 1.0, 7 * 1.5, 9 * 2.0]))


def test_wanda_of_a_group_is_the_sum_of_its_inputs() -> None:
    score_U = SCORES.get("wanda").score(by_hand(3, torch.ones(1)))
    torch.testing.assert_close(score_U, torch.tensor([5 * 1.0 + 7 * 1.5 + 9 * 2.0]))


def test_wanda_is_a_mean_over_tokens() -> None:
    """Seeing every token twice changes nothing."""
    problem = make_problem(6, 2)
    twice = replace(
        problem, fit=replace(problem.fit, gram_II=2 * problem.fit.gram_II, num_tokens=2 * problem.fit.num_tokens)
    )
    score = SCORES.get("wanda").score
    torch.testing.assert_close(score(twice), score(problem))


def test_magnitude_by_hand() -> None:
    score_U = SCORES.get("magnitude").score(by_hand(1, torch.tensor([2.0, 1.0, 0.5])))
    expected_U = torch.tensor([2.0 * 17**0.5, 1.0 * 29**0.5, 0.5 * 45**0.5])
    torch.testing.assert_close(score_U, expected_U)


def test_magnitude_of_a_group_is_the_norm_of_its_slice() -> None:
    score_U = SCORES.get("magnitude").score(by_hand(3, torch.tensor([2.0])))
    torch.testing.assert_close(score_U, torch.tensor([2.0 * (17 + 29 + 45) ** 0.5]))
    problem = make_problem(6, 4)
    expected_U = torch.stack([problem.weight_OI[:, 4 * u : 4 * u + 4].norm() for u in range(6)])
    torch.testing.assert_close(SCORES.get("magnitude").score(problem), expected_U * problem.producer_norms_MU.prod(0))


def test_group_norm_by_hand() -> None:
    """A mean over all matrices of squares: two producers and the consumer."""
    problem = replace(by_hand(1, torch.ones(3)), producer_norms_MU=torch.tensor([[2.0, 1.0, 0.5], [1.0, 3.0, 2.0]]))
    expected_U = torch.tensor([4.0 + 1.0 + 17, 1.0 + 9.0 + 29, 0.25 + 4.0 + 45]) / 3
    torch.testing.assert_close(SCORES.get("group-norm").score(problem), expected_U)


def test_l2_by_hand() -> None:
    score = SCORES.get("l2").score
    torch.testing.assert_close(score(by_hand(1, torch.ones(3))), torch.tensor([17 * 1.0, 29 * 2.25, 45 * 4.0]))
    torch.testing.assert_close(score(by_hand(3, torch.ones(1))), torch.tensor([17 * 1.0 + 29 * 2.25 + 45 * 4.0]))


@pytest.mark.parametrize("width", [1, 4])
def test_obs_is_half_the_error_after_the_refit(width: int) -> None:
    """Per token; by its definition: drop the unit, solve the others by least squares, measure."""
    problem = replace(make_problem(6, width), damping=1e-12)
    exact = replace(problem.fit, gram_II=problem.fit.gram_II.double())
    problem = replace(problem, fit=exact, weight_OI=problem.weight_OI.double())
    score_U = SCORES.get("obs").score(problem)
    for unit in range(6):
        keep_U = torch.arange(6) != unit
        difference_OI = problem.weight_OI.clone()
        kept_K = problem.kept_inputs(keep_U)
        difference_OI[:, kept_K] -= SOLVERS.get("least-squares").solve(problem, keep_U).weight_OK
        error = float(((difference_OI @ problem.fit.gram_II.double()) * difference_OI).sum())
        expected = 0.5 * error / problem.fit.num_tokens
        assert float(score_U[unit]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("width", [1, 4])
def test_loss_with_equal_sensitivities_is_obs(width: int) -> None:
    """F = c I weighs every output alike, up to the thousandth that makes F definite."""
    problem = replace(make_problem(6, width), sensitivity_OO=4.0 * torch.eye(5))
    expected_U = 4.0 * SCORES.get("obs").score(problem)
    torch.testing.assert_close(SCORES.get("loss").score(problem), expected_U, rtol=2e-3, atol=0)


def test_loss_without_a_sensitivity_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs the output sensitivity"):
        SCORES.get("loss").score(replace(make_problem(6, 1), sensitivity_OO=None))


def test_taylor_scores_by_hand() -> None:
    taylor = TaylorSums(
        signed_U=torch.tensor([-3.0, 1.0, 2.0]),
        first_U=torch.tensor([4.0, 1.0, 2.5]),
        second_U=torch.tensor([0.5, 0.25, 1.0]),
        mixed_U=torch.tensor([3.75, 0.875, 2.0]),
    )
    problem = replace(by_hand(1, torch.ones(3)), taylor=taylor)
    found = {name: SCORES.get(name).score(problem).tolist() for name in TAYLOR}
    assert found == {
        "taylor-vector": [3.0, 1.0, 2.0],
        "taylor-first": [4.0, 1.0, 2.5],
        "taylor-second": [0.5, 0.25, 1.0],
        "taylor-mix": [3.75, 0.875, 2.0],
    }


@pytest.mark.parametrize("name", TAYLOR)
def test_taylor_without_gradients_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="need gradients by the weights"):
        SCORES.get(name).score(replace(make_problem(6, 1), taylor=None))


@pytest.mark.parametrize("num_keep", [0, 1, 3, 6])
def test_keep_best(num_keep: int) -> None:
    keep_U = keep_best(torch.tensor([0.5, 2.0, 1.0, 3.0, 0.0, 2.5]), num_keep)
    assert keep_U.nonzero().flatten().tolist() == sorted([3, 5, 1, 2, 0, 4][:num_keep])


def test_keep_best_breaks_ties_to_the_lower_number() -> None:
    assert keep_best(torch.ones(6), 2).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("name", list(SELECTORS))
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("num_keep", [1, 4, 8])
@pytest.mark.parametrize("with_sensitivity", [False, True])
def test_selector_keeps_as_many_as_asked(name: str, width: int, num_keep: int, with_sensitivity: bool) -> None:
    problem = make_problem(8, width)
    if not with_sensitivity:
        problem = replace(problem, sensitivity_OO=None)
    selector = SELECTORS.get(name).keep
    keep_U = selector(problem, num_keep)
    assert (keep_U.dtype, keep_U.shape, int(keep_U.sum())) == (torch.bool, (8,), num_keep)
    assert torch.equal(keep_U, selector(problem, num_keep))
    order_U = torch.tensor([3, 5, 0, 7, 1, 6, 4, 2])
    order_I = (order_U[:, None] * width + torch.arange(width)).flatten()
    permuted = replace(problem, weight_OI=problem.weight_OI[:, order_I], fit=problem.fit.reordered(order_I))
    assert torch.equal(selector(permuted, num_keep), keep_U[order_U])


def test_keep_best_of_each_partition() -> None:
    score_U = torch.tensor([0.5, 2.0, 1.0, 30.0, 10.0, 20.0])
    assert keep_best(score_U, 2, partitions=2).nonzero().flatten().tolist() == [1, 3]
    assert keep_best(score_U, 4, partitions=2).nonzero().flatten().tolist() == [1, 2, 3, 5]
    assert ascending(score_U, partitions=2).tolist() == [0.5, 10.0, 1.0, 20.0, 2.0, 30.0]
    assert ascending(score_U).tolist() == [0.5, 1.0, 2.0, 10.0, 20.0, 30.0]


# Exchanges know no partitions.
@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "greedy-swap"])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("num_keep", [2, 4, 8])
def test_selector_keeps_as_many_in_each_partition(name: str, width: int, num_keep: int) -> None:
    """Also where one of them is far above the other; the order of the partitions means nothing."""
    problem = replace(make_problem(8, width), partitions=2)
    problem.weight_OI[:, : 4 * width] *= 100
    selector = SELECTORS.get(name).keep
    keep_U = selector(problem, num_keep)
    assert keep_U.reshape(2, 4).sum(dim=1).tolist() == [num_keep // 2] * 2
    if num_keep < 8:
        assert not torch.equal(keep_U, selector(replace(problem, partitions=1), num_keep))
    order_I = torch.arange(8 * width).roll(4 * width)
    swapped = replace(problem, weight_OI=problem.weight_OI[:, order_I], fit=problem.fit.reordered(order_I))
    assert torch.equal(selector(swapped, num_keep), keep_U.roll(4))


@pytest.mark.parametrize("name", list(SELECTORS))
@pytest.mark.parametrize("width", [1, 4])
def test_selector_drops_units_without_weights_first(name: str, width: int) -> None:
    """With independent inputs nothing can be moved onto them, and their removal costs nothing."""
    problem = make_problem(8, width)
    problem = replace(problem, fit=replace(problem.fit, gram_II=torch.eye(8 * width)))
    for unit in (1, 6):
        problem.weight_OI[:, unit * width : (unit + 1) * width] = 0
    assert SELECTORS.get(name).keep(problem, 6).tolist() == [True, False, True, True, True, True, False, True]


def test_random_is_the_seeds_draw() -> None:
    problem = make_problem(50, 1)
    draw = SCORES.get("random").score
    assert torch.equal(draw(problem), draw(problem))
    assert not torch.equal(draw(problem), draw(replace(problem, seed=1)))


def test_fluctuation_by_hand() -> None:
    """Inputs of variance 1, 4 and 0 about means 3, 0 and 5; squared column norms 5, 1 and 2."""
    x_TI = torch.tensor([[2.0, -2.0, 5.0], [4.0, 2.0, 5.0]])
    problem = replace(
        by_hand(1, torch.ones(3)),
        weight_OI=torch.tensor([[1.0, 0.0, 1.0], [2.0, 1.0, -1.0]]),
        fit=Moments(gram_II=x_TI.T @ x_TI, num_tokens=2, sum_I=x_TI.double().sum(dim=0)),
    )
    assert SCORES.get("fluctuation").score(problem).tolist() == [5.0, 4.0, 0.0]
    assert SCORES.get("fluctuation").score(replace(problem, width=3)).tolist() == [3.0]


@pytest.mark.parametrize("width", [1, 2])
def test_full_shrinkage_leaves_each_unit_to_itself(width: int) -> None:
    """Then a unit costs 1/2 tr(F W_g (G_gg + delta I) W_g^T), whatever else is removed, and the cheapest go."""
    problem = replace(make_problem(6, width), shrinkage=1.0)
    assert problem.sensitivity_OO is not None
    damped = problem.fit.gram_II + problem.damping * problem.fit.gram_II.diagonal().mean() * torch.eye(6 * width)
    sensitivity = problem.sensitivity_OO + 1e-3 * problem.sensitivity_OO.diagonal().mean() * torch.eye(5)
    cost_U = torch.empty(6)
    for unit in range(6):
        part = slice(unit * width, (unit + 1) * width)
        weight = problem.weight_OI[:, part]
        cost_U[unit] = 0.5 * (sensitivity @ weight @ damped[part, part] @ weight.T).trace() / problem.fit.num_tokens
    path = removal_path(problem, 6)
    assert path.order.tolist() == cost_U.argsort().tolist()
    torch.testing.assert_close(path.cost.float(), cost_U.sort().values, rtol=1e-4, atol=0)


def test_shrinkage_keeps_what_units_are_and_scales_what_they_share() -> None:
    problem = replace(make_problem(3, 2), shrinkage=0.25)
    own = torch.block_diag(*(torch.ones(2, 2),) * 3).bool()
    shrunk_II = shrunk_gram(problem)
    torch.testing.assert_close(shrunk_II[own], problem.fit.gram_II.double()[own])
    torch.testing.assert_close(shrunk_II[~own], 0.75 * problem.fit.gram_II.double()[~own])
    assert torch.equal(shrunk_gram(replace(problem, shrinkage=0.0)), problem.fit.gram_II.double())
