"""Pruners of single weights: identities in float64, and the order of their errors on random problems."""

from __future__ import annotations

import itertools
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import Tensor

from structprune.linalg.cholesky import damped_cholesky, inverse_factored
from structprune.patterns import NM, Pattern, Unstructured, sparse
from structprune.rows import DiagonalRows
from structprune.solvers.elements import PRUNERS, UPDATES, blockwise, fista
from structprune.solvers.elements.problem import SparseProblem, SparseSolution
from structprune.solvers.elements.unit import (
    CANDIDATES,
    chosen_damping,
    refit_unit,
    relative_error,
    squared_error,
    unit_gram,
    unit_problem,
    wanted_weight,
)
from structprune.types import Moments
from support.sparse_problems import (
    FOUR_OF_EIGHT,
    HALF,
    MANY,
    TWO_OF_FOUR,
    damped_error,
    inputs,
    sparse_problem,
    sums,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = range(6)
ROWS = Unstructured(share=0.5, scope="row")
ALL = [(name, pattern) for name in PRUNERS for pattern in (HALF, ROWS, TWO_OF_FOUR)]


def solved(name: str, problem: SparseProblem) -> SparseSolution:
    return PRUNERS.get(name).prune(problem)


def exact_refit(problem: SparseProblem, keep_OI: Tensor) -> Tensor:
    """Row after row by the normal equations of the damped problem."""
    gram_II = problem.moments.gram_II
    assert isinstance(gram_II, Tensor)
    ridge_I = problem.damping * gram_II.diagonal()
    damped_II = gram_II + ridge_I.diag()
    answer_OI = torch.zeros_like(problem.weight_OI)
    for row, kept_I in enumerate(keep_OI):
        right_K = (problem.weight_OI[row] @ damped_II)[kept_I]
        answer_OI[row, kept_I] = torch.linalg.solve(damped_II[kept_I][:, kept_I], right_K)
    return answer_OI


@pytest.mark.parametrize(("name", "pattern"), ALL, ids=lambda value: value if isinstance(value, str) else value.name)
def test_zeros_are_exact_and_positive(name: str, pattern: Pattern) -> None:
    problem = sparse_problem(pattern)
    solution = solved(name, problem)
    zero_OI = solution.weight_OI == 0
    # A penalty may make a zero of what stays.
    assert int((~solution.keep_OI).sum()) == 48 * 96 // 2 <= int(zero_OI.sum()) <= 48 * 96 // 2 + 5
    assert zero_OI[~solution.keep_OI].all()
    if pattern == ROWS:
        assert ((~solution.keep_OI).sum(dim=1) == 48).all()
    assert pattern.matches(solution.weight_OI)
    assert not torch.signbit(solution.weight_OI[zero_OI]).any()
    again = solved(name, problem)
    assert torch.equal(again.weight_OI, solution.weight_OI)


@pytest.mark.parametrize("name", list(PRUNERS))
def test_reads_no_more_than_it_says(name: str) -> None:
    """A pruner that reads energies sees a diagonal Gram; one that reads nothing sees zeros."""
    problem = sparse_problem(HALF)
    gram_II = problem.moments.gram_II
    if "gram" in PRUNERS.get(name).reads:
        blind = replace(problem, moments=replace(problem.moments, gram_II=DiagonalRows(values_I=gram_II.diagonal())))
        assert not torch.equal(solved(name, blind).weight_OI, solved(name, problem).weight_OI)
        return
    known = DiagonalRows(values_I=gram_II.diagonal() if PRUNERS.get(name).reads else torch.zeros(96))
    blind = replace(problem, moments=Moments(gram_II=known, num_tokens=1))
    assert torch.equal(solved(name, blind).weight_OI, solved(name, problem).weight_OI)


def test_the_order_of_errors() -> None:
    """Magnitude >> RIA ~ Wanda > SparseGPT >= Thanos ~ APT > ALPS ~ FISTA with a refit; ALPS never above SparseGPT."""
    for pattern, share in ((HALF, 0.72), (MANY, 0.68), (TWO_OF_FOUR, 0.80)):
        ratios: dict[str, list[float]] = {}
        for seed in SEEDS:
            problem = sparse_problem(pattern, seed)
            base = damped_error(problem, solved("sparsegpt", problem))
            for name in PRUNERS:
                ratios.setdefault(name, []).append(damped_error(problem, solved(name, problem)) / base)
        middle = {name: median(values) for name, values in ratios.items()}
        assert max(ratios["alps"]) < 1
        assert middle["alps"] == pytest.approx(share, abs=0.06)
        assert middle["magnitude"] > 3 * middle["ria"]
        assert middle["ria"] > middle["wanda"] > 1.05
        assert 0.8 < middle["thanos"] <= 1.0
        assert 0.8 < middle["apt"] <= 1.0
        assert middle["alps"] < middle["fista-unit"] < min(middle["thanos"], middle["apt"])
        assert middle["fista"] < 1.01


def test_a_freer_pattern_costs_less() -> None:
    for seed in SEEDS:
        errors = [
            damped_error(problem := sparse_problem(pattern, seed), solved("alps", problem))
            for pattern in (HALF, FOUR_OF_EIGHT, TWO_OF_FOUR)
        ]
        assert errors[0] <= errors[1] <= errors[2]


@pytest.mark.parametrize("name", list(PRUNERS))
def test_a_refit_is_never_worse_on_the_same_mask(name: str) -> None:
    problem = sparse_problem(TWO_OF_FOUR, 3)
    solution = solved(name, problem)
    refitted = UPDATES.get("refit").solve(problem, solution)
    assert torch.equal(refitted.keep_OI, solution.keep_OI)
    assert damped_error(problem, refitted) <= damped_error(problem, solution) * (1 + 1e-6)
    exact_OI = exact_refit(problem, solution.keep_OI)
    assert torch.linalg.norm(refitted.weight_OI - exact_OI) < 2e-3 * torch.linalg.norm(exact_OI)


def test_joint_removal_of_all_inputs_is_the_refit() -> None:
    problem = sparse_problem(HALF)
    keep_OI = solved("wanda", problem).keep_OI
    joint = blockwise.prune_blockwise(problem, blockwise.SPARSEGPT_CHOICE, "at once", block=96, keep_OI=keep_OI)
    assert torch.allclose(joint.weight_OI, exact_refit(problem, keep_OI), rtol=1e-9, atol=1e-10)


def test_many_steps_of_the_refit_are_exact() -> None:
    problem = sparse_problem(HALF)
    keep_OI, unit = solved("wanda", problem).keep_OI, unit_problem(problem)
    weight_OI = unit.original(refit_unit(unit, keep_OI, 200, least_gain=0), keep_OI, problem.weight_OI)
    assert torch.allclose(weight_OI, exact_refit(problem, keep_OI), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("removal", ["in turn", "at once"])
def test_with_a_known_mask_blocks_change_nothing(removal: str) -> None:
    """One after the other the blocks do not matter; all at once they do, but not to whole columns of one block."""
    problem = sparse_problem(HALF)
    keep_OI = solved("wanda", problem).keep_OI
    first, second = (
        blockwise.prune_blockwise(problem, blockwise.SPARSEGPT_CHOICE, "in turn", block=block, keep_OI=keep_OI)
        for block in (16, 96)
    )
    assert torch.allclose(first.weight_OI, second.weight_OI, rtol=1e-10, atol=1e-12)
    if removal == "at once":
        # Larger blocks know more of what goes.
        errors = [
            damped_error(
                problem,
                blockwise.prune_blockwise(problem, blockwise.SPARSEGPT_CHOICE, "at once", block=block, keep_OI=keep_OI),
            )
            for block in (8, 32, 96)
        ]
        assert errors[0] > errors[1] > errors[2]


def test_sparsegpt_in_groups_does_not_depend_on_its_blocks() -> None:
    problem = sparse_problem(TWO_OF_FOUR)
    first, second = (
        blockwise.prune_blockwise(problem, blockwise.SPARSEGPT_CHOICE, "in turn", block=block) for block in (8, 96)
    )
    assert torch.equal(first.keep_OI, second.keep_OI)
    assert torch.allclose(first.weight_OI, second.weight_OI, rtol=1e-9, atol=1e-11)


def test_the_factor_gives_every_trailing_inverse() -> None:
    problem = sparse_problem(HALF)
    upper_II, raised = blockwise.upper_factor(problem)
    damped_II = unit_gram(problem.moments, torch.float64)
    damped_II.diagonal().add_(problem.damping)
    assert not raised
    for start in (0, 5, 90):
        expected = torch.linalg.inv(damped_II[start:, start:])
        assert torch.allclose(upper_II[start:, start:].T @ upper_II[start:, start:], expected, rtol=1e-10, atol=1e-11)


def test_an_indefinite_matrix_has_no_factor_of_its_inverse() -> None:
    matrix_NN = torch.eye(300, dtype=torch.float64)
    assert inverse_factored(matrix_NN.clone())[1]
    for place in (0, 150, 299):
        broken_NN = matrix_NN.clone()
        broken_NN[place, place] = -1
        assert not inverse_factored(broken_NN)[1]


@pytest.mark.parametrize("pattern", [HALF, ROWS, TWO_OF_FOUR], ids=lambda pattern: pattern.name)
def test_alps_by_a_few_rows_is_alps_of_all(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = sparse_problem(pattern, 3)
    whole = solved("alps", problem)
    for name, number in (("_LEAST_ROWS", 5), ("_GROUP_NUMBERS", 1)):
        monkeypatch.setattr(f"structprune.solvers.elements.unit.{name}", number)
    parts = solved("alps", problem)
    assert torch.equal(parts.keep_OI, whole.keep_OI)
    # Each group of rows ends its refit when it has no more to gain.
    assert damped_error(problem, parts) == pytest.approx(damped_error(problem, whole), rel=1e-4)
    assert parts.statistics == whole.statistics


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "thanos", "apt", "alps", "fista-unit"])
def test_a_scale_may_move_between_weight_and_input(name: str) -> None:
    """W / s on inputs s x is the same map: the answer is V / s."""
    problem = sparse_problem(TWO_OF_FOUR, 2)
    scale_I = torch.logspace(-2, 2, 96, dtype=torch.float64)
    assert isinstance(problem.moments.gram_II, Tensor)
    gram_II = problem.moments.gram_II * scale_I * scale_I[:, None]
    moved = replace(problem, weight_OI=problem.weight_OI / scale_I, moments=replace(problem.moments, gram_II=gram_II))
    expected = solved(name, problem)
    found = solved(name, moved)
    assert torch.equal(found.keep_OI, expected.keep_OI)
    assert torch.allclose(found.weight_OI * scale_I, expected.weight_OI, rtol=1e-6, atol=1e-8)


def test_a_dense_target_shifts_the_weight() -> None:
    """tr((V - W_d) H (V - W_d)^T) is sum |V x* - y|^2 + delta |V - W|^2 less a constant, for any V."""
    clean_IT = inputs(4)[:, :960]
    noisy_IT = clean_IT + 0.3 * clean_IT.std(dim=1, keepdim=True) * torch.randn(
        clean_IT.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    local = sparse_problem(HALF, 4)
    wanted_OT = local.weight_OI @ clean_IT
    fit = replace(sums(noisy_IT), target_OI=wanted_OT @ noisy_IT.T, target_energy=float(wanted_OT.square().sum()))
    problem = replace(local, moments=fit)
    unit = unit_problem(problem)
    shifted_OI = wanted_weight(problem, problem.damping)
    constants: list[float] = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight_OI = problem.weight_OI + torch.randn(48, 96, generator=generator, dtype=torch.float64)
        error = squared_error(weight_OI, problem, fit)
        assert error == pytest.approx(float((weight_OI @ noisy_IT - wanted_OT).square().sum()), rel=1e-9)
        ridge = problem.damping * float(((weight_OI - problem.weight_OI) * unit.scale_I).square().sum())
        away_OI = (weight_OI - shifted_OI) * unit.scale_I
        constants.append(error + ridge - float(((away_OI @ unit.gram_II) * away_OI).sum()))
    assert constants == pytest.approx([constants[0]] * 3, rel=1e-8)
    # And solving for it meets the dense output better than solving for the local one.
    followed, own = solved("alps", problem), solved("alps", replace(local, moments=sums(noisy_IT)))
    assert squared_error(followed.weight_OI, problem, fit) < squared_error(own.weight_OI, problem, fit)


def test_an_input_without_energy_goes_first_and_keeps_its_weight_else() -> None:
    x_IT = inputs(1)[:, :960]
    x_IT[3] = 0
    for share, gone in ((0.5, True), (0.0, False)):
        problem = sparse_problem(Unstructured(share=share, scope="row"), 1, moments=sums(x_IT))
        for name in ("wanda", "sparsegpt", "thanos", "apt", "alps", "fista", "fista-unit"):
            weight_OI = solved(name, problem).weight_OI
            assert torch.isfinite(weight_OI).all()
            expected_O = torch.zeros(48, dtype=torch.float64) if gone else problem.weight_OI[:, 3]
            assert torch.equal(weight_OI[:, 3], expected_O), name


@pytest.mark.parametrize("name", list(PRUNERS))
def test_fewer_tokens_than_inputs(name: str) -> None:
    problem = sparse_problem(HALF, moments=sums(inputs(0)[:, :40]), damping=1e-3)
    solution = solved(name, problem)
    assert torch.isfinite(solution.weight_OI).all()
    assert relative_error(solution.weight_OI, problem, problem.moments) < 1


@pytest.mark.parametrize("name", list(PRUNERS))
def test_float32_finds_what_float64_finds(name: str) -> None:
    problem = sparse_problem(TWO_OF_FOUR, 1)
    narrow = replace(problem, weight_OI=problem.weight_OI.float())
    wide, found = solved(name, problem), solved(name, narrow)
    assert found.weight_OI.dtype == torch.float32
    assert float((wide.keep_OI == found.keep_OI).double().mean()) > 0.999
    assert damped_error(problem, replace(found, weight_OI=found.weight_OI.double())) == pytest.approx(
        damped_error(problem, wide), rel=1e-3
    )


def test_held_out_windows_choose_the_ridge() -> None:
    """Few tokens want a large one; windows that are those of the fit want none."""
    x_IT = inputs(5)
    few, many, others = (sums(x_IT[:, part]) for part in (slice(110), slice(960), slice(960, None)))
    assert chosen_damping(sparse_problem(HALF, 5, moments=few), others) == max(CANDIDATES)
    assert chosen_damping(sparse_problem(HALF, 5, moments=many), many) == min(CANDIDATES)


def test_fista_minimises_its_objective() -> None:
    """The conditions of the l1 problem hold on and off the support, and the published bound at every length."""
    problem = sparse_problem(HALF, 2)
    unit = unit_problem(problem)
    loss = fista._Quadratic.of(unit.gram_II, unit.weight_OI)  # pyright: ignore[reportPrivateUsage]
    curvature = float(torch.linalg.eigvalsh(unit.gram_II)[-1])
    assert curvature <= loss.largest_curvature() <= 1.011 * curvature
    penalty = 0.05 * float(loss.product_OI.abs().max())

    def objective(weight_OI: Tensor) -> float:
        return loss.error(weight_OI) ** 2 / 2 + penalty * float(weight_OI.abs().sum())

    best_OI = fista.minimise(loss, unit.weight_OI, penalty, curvature, 3000)
    gradient_OI = (best_OI - unit.weight_OI) @ unit.gram_II
    active_OI = best_OI != 0
    assert torch.allclose(gradient_OI[active_OI], -penalty * best_OI[active_OI].sign(), atol=1e-6 * penalty)
    assert (gradient_OI[~active_OI].abs() <= penalty * (1 + 1e-6)).all()
    distance = float((unit.weight_OI - best_OI).square().sum())
    for steps in (1, 5, 20, 100):
        found = objective(fista.minimise(loss, unit.weight_OI, penalty, curvature, steps))
        assert found - objective(best_OI) <= 2 * curvature * distance / (steps + 1) ** 2


def test_wanda_is_optimal_brain_surgeon_for_independent_inputs() -> None:
    energy_I = torch.logspace(0, 3, 96, dtype=torch.float64)
    problem = sparse_problem(HALF, moments=Moments(gram_II=torch.diag(energy_I), num_tokens=10))
    factor = damped_cholesky(problem.moments.gram_II.to(torch.float64), 1e-12, "test").factor_NN  # type: ignore[union-attr]
    surgeon_OI = problem.weight_OI.square() / torch.cholesky_inverse(factor).diagonal()
    wanda_OI = (problem.weight_OI.abs() * energy_I.sqrt()).square()
    assert torch.allclose(surgeon_OI, wanda_OI, rtol=1e-9)
    assert torch.equal(solved("wanda", problem).keep_OI, HALF.keep_largest(surgeon_OI))


def test_a_group_of_two_of_four_by_brute_force() -> None:
    """With one group the best mask of six is ALPS' mask, for most rows: it is no worse than SparseGPT's in any."""
    x_IT = inputs(7)[:4, :400]
    problem = sparse_problem(
        NM(keep=2, of=4), 7, moments=sums(x_IT), weight_OI=torch.randn(40, 4, dtype=torch.float64), energy_NI=None
    )
    best_O = torch.full((40,), torch.inf, dtype=torch.float64)
    unit = unit_problem(problem)

    def by_row(weight_OI: Tensor) -> Tensor:
        away_OI = (weight_OI - problem.weight_OI) * unit.scale_I
        return ((away_OI @ unit.gram_II) * away_OI).sum(dim=1)

    for kept in itertools.combinations(range(4), 2):
        keep_OI = torch.zeros(40, 4, dtype=torch.bool)
        keep_OI[:, list(kept)] = True
        best_O = torch.minimum(best_O, by_row(exact_refit(problem, keep_OI)))
    found_O = by_row(solved("alps", problem).weight_OI)
    assert (found_O >= best_O * (1 - 1e-9)).all()
    assert float((found_O <= best_O * (1 + 1e-6)).double().mean()) > 0.7
    assert float(sparse(problem.weight_OI, solved("alps", problem).keep_OI).count_nonzero()) == 80


def test_the_widest_maps_are_factored_in_float32_with_a_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = sparse_problem(TWO_OF_FOUR, 1)
    narrow = replace(problem, weight_OI=problem.weight_OI.float())
    wide = solved("sparsegpt", narrow)
    monkeypatch.setattr(blockwise, "_WIDE", 95)
    found = solved("sparsegpt", narrow)
    assert found.status == "ok"
    assert damped_error(problem, replace(found, weight_OI=found.weight_OI.double())) == pytest.approx(
        damped_error(problem, replace(wide, weight_OI=wide.weight_OI.double())), rel=2e-3
    )
    assert solved("sparsegpt", replace(narrow, damping=1e-3)).status == "damping-raised"
