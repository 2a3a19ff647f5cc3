"""Units are chosen and weights solved where the sums lie: wholly on that device, with the host's results.

All entries of the registries are run on the fake device (`fake_device.py`), which refuses tensors of the host.
Of the entries that search, each pair of settings is run by default, and all of them with the slow tests.
Shape suffixes: T tokens, D hidden, N kept channels, O outputs, I inputs, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.linalg.cholesky import damped_cholesky, inverted, solved
from structprune.linalg.gram_products import fitting_error, output_energy
from structprune.linalg.rotation import dropped_share, principal_basis, rotated
from structprune.scores import SCORES, SELECTORS, score_or_selector
from structprune.scores.blocks import angular_distance
from structprune.scores.selection import ascending, decision_objective, keep_best, removal_path
from structprune.solvers import SOLVERS
from structprune.solvers.mlp.block import MlpTokens, MlpWeights
from structprune.solvers.mlp.updates import ACTIVATIONS, Affine
from structprune.types import AxisSlice, LayerProblem, Moments, SolveResult, TaylorSums
from support import fake_device
from support.combinations import by_pairs

DEVICE = torch.device("fake", 0)
NUM_UNITS = 40
# More than the mixtures by which ridges are chosen, so that these are drawn.
NUM_OUTPUTS = 140
NUM_KEEP = 24


def moved(value: Any) -> Any:
    """The same value with all of its tensors on the fake device."""
    if isinstance(value, Tensor):
        return value.to("fake")
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: moved(getattr(value, each.name)) for each in fields(value)})
    return value


def check_same(here: Any, there: Any) -> None:
    """The same bits; every tensor of `there` on the fake device."""
    if isinstance(here, Tensor):
        assert isinstance(there, Tensor)
        assert (here.device.type, there.device) == ("cpu", DEVICE)
        assert here.dtype == there.dtype
        assert torch.equal(there.cpu(), here)
    elif is_dataclass(here):
        assert type(here) is type(there)
        for each in fields(here):
            check_same(getattr(here, each.name), getattr(there, each.name))
    elif isinstance(here, Mapping):
        assert here.keys() == there.keys()
        for key in here:
            check_same(here[key], there[key])
    elif isinstance(here, (list, tuple)):
        for ours, theirs in zip(here, there, strict=True):
            check_same(ours, theirs)
    else:
        assert here == there


def on_both(run: Callable[..., Any], *values: Any) -> Any:
    """Run on the host and on the fake device, and compare; nothing is left behind on the latter."""
    here = run(*values)
    check_same(here, run(*(moved(value) for value in values)))
    return here


def moments(num_tokens: int, weight_OI: Tensor, *, target: bool, generator: torch.Generator) -> Moments:
    num_inputs = weight_OI.shape[1]
    mix_II = torch.randn(num_inputs, num_inputs, generator=torch.Generator().manual_seed(5)) / num_inputs**0.5
    x_TI = torch.randn(num_tokens, num_inputs, generator=generator) @ mix_II + 0.3
    y_TO = x_TI @ weight_OI.T + torch.randn(num_tokens, NUM_OUTPUTS, generator=generator)
    return Moments(
        gram_II=x_TI.T @ x_TI,
        num_tokens=num_tokens,
        sum_I=x_TI.double().sum(dim=0),
        target_OI=y_TO.T @ x_TI if target else None,
        target_energy=float(y_TO.double().square().sum()) if target else None,
    )


def make_problem(
    width: int,
    *,
    target: bool,
    held_out: bool,
    sensitivity: bool = False,
    partitions: int = 1,
    num_units: int = NUM_UNITS,
) -> LayerProblem:
    generator = torch.Generator().manual_seed(7)
    weight_OI = torch.randn(NUM_OUTPUTS, num_units * width, generator=generator)
    parts = [
        moments(num_tokens, weight_OI, target=target, generator=generator)
        for num_tokens in ((150, 50) if held_out else (200,))
    ]
    gradient_TO = torch.randn(60, NUM_OUTPUTS, generator=generator) * torch.linspace(0.1, 3, NUM_OUTPUTS)
    return LayerProblem(
        weight_OI=weight_OI,
        fit=parts[0],
        held_out=parts[1] if held_out else None,
        width=width,
        partitions=partitions,
        damping=1e-3,
        shrinkage=0.1,
        producer_norms_MU=torch.rand(1, num_units, generator=generator) + 0.5,
        seed=3,
        sensitivity_OO=gradient_TO.T @ gradient_TO / 60 if sensitivity else None,
        taylor=TaylorSums(
            **{each.name: torch.randn(num_units, generator=generator).double() for each in fields(TaylorSums)}
        ),
    )


@pytest.mark.parametrize("name", list(SCORES))
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("partitions", [1, 2])
def test_scores(name: str, width: int, target: bool, partitions: int) -> None:
    problem = make_problem(width, target=target, held_out=False, sensitivity=True, partitions=partitions)
    score = SCORES.get(name).score

    def run(problem: LayerProblem) -> tuple[Tensor, ...]:
        score_U = score(problem)
        return score_U, keep_best(score_U, NUM_KEEP, partitions), ascending(score_U, partitions)

    assert int(on_both(run, problem)[1].sum()) == NUM_KEEP


# Exchanges know no partitions.
@pytest.mark.parametrize(
    ("name", "partitions"), [*product(SELECTORS, [1]), *product([x for x in SELECTORS if x != "greedy-swap"], [2])]
)
@pytest.mark.parametrize(
    ("width", "target", "sensitivity", "num_keep"),
    by_pairs([1, 2], [False, True], [False, True], [NUM_KEEP, NUM_UNITS]),
)
def test_selectors(name: str, partitions: int, width: int, target: bool, sensitivity: bool, num_keep: int) -> None:
    problem = make_problem(width, target=target, held_out=False, sensitivity=sensitivity, partitions=partitions)
    keep_U = on_both(lambda problem: SELECTORS.get(name).keep(problem, num_keep), problem)
    assert (keep_U.dtype, int(keep_U.sum())) == (torch.bool, num_keep)


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize(
    ("width", "target", "held_out", "num_keep"), by_pairs([1, 2], [False, True], [False, True], [NUM_KEEP, NUM_UNITS])
)
def test_solvers(name: str, width: int, target: bool, held_out: bool, num_keep: int) -> None:
    problem = make_problem(width, target=target, held_out=held_out)

    def run(problem: LayerProblem) -> SolveResult:
        return SOLVERS.get(name).solve(problem, keep_best(SCORES.get("l2").score(problem), num_keep))

    result = on_both(run, problem)
    assert result.weight_OK.shape == (NUM_OUTPUTS, num_keep * width)


@pytest.mark.parametrize(
    ("name", "activation", "gated", "bias"),
    by_pairs(
        [name for name in SOLVERS if SOLVERS.get(name).propose is not None],
        ["relu", "silu", "gelu", "gelu_new"],
        [False, True],
        [False, True],
    ),
)
def test_iterative_solvers(name: str, activation: str, gated: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)

    def affine(num_outputs: int, num_inputs: int) -> Affine:
        weight_OI = torch.randn(num_outputs, num_inputs, generator=generator) / num_inputs**0.5
        return Affine(weight_OI=weight_OI, bias_O=torch.randn(num_outputs, generator=generator) if bias else None)

    weights = MlpWeights(
        activation=ACTIVATIONS.get(activation),
        up=affine(20, 12),
        down=affine(12, 20),
        gate=affine(20, 12) if gated else None,
    )
    # Two chunks; the target is that of more channels than these.
    x_TD = torch.randn(700, 12, generator=generator)
    removed = replace(weights, up=affine(20, 12), down=affine(12, 20))
    y_TD = weights.down(weights.hidden(x_TD)) + removed.down(removed.hidden(x_TD))

    def run(x_TD: Tensor, y_TD: Tensor, up: Affine, down: Affine, gate: Affine | None) -> list[Any]:
        tokens = MlpTokens(x_TD=x_TD, y_TD=y_TD)
        propose = SOLVERS.get(name).propose
        assert propose is not None
        solution = propose(tokens, replace(weights, up=up, down=down, gate=gate))
        found = solution.weights
        return [found.up, found.down, found.gate, solution.history, solution.status, solution.statistics]

    up, _, _, history, *_ = on_both(run, x_TD, y_TD, weights.up, weights.down, weights.gate)
    assert len(history) > 1
    assert not torch.equal(up.weight_OI, weights.up.weight_OI)


@pytest.mark.parametrize(("width", "target", "partitions"), by_pairs([1, 2], [False, True], [1, 2]))
def test_order_and_costs_of_removal(width: int, target: bool, partitions: int) -> None:
    """To the last unit, and of none."""
    problem = make_problem(width, target=target, held_out=False, partitions=partitions)
    path = on_both(lambda problem: removal_path(problem, NUM_UNITS), problem)
    assert path.order.sort().values.tolist() == list(range(NUM_UNITS))
    assert len(on_both(lambda problem: removal_path(problem, 0), problem).order) == 0


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("target", [False, True])
def test_errors_and_objectives(width: int, target: bool) -> None:
    problem = make_problem(width, target=target, held_out=True)

    def run(problem: LayerProblem) -> list[float]:
        keep_U = keep_best(SCORES.get("l2").score(problem), NUM_KEEP)
        kept_K, removed_P = problem.kept_inputs(keep_U), problem.kept_inputs(~keep_U)
        total = problem.total()
        energy = total.target_energy or output_energy(problem.weight_OI, total.gram_II)
        return [
            decision_objective(problem, keep_U),
            energy,
            output_energy(problem.weight_OI[:, removed_P], total.gram_II, removed_P),
            fitting_error(
                problem.weight_OI[:, kept_K], kept_K, problem.weight_OI, total.gram_II, total.target_OI, energy
            ),
        ]

    assert min(on_both(run, problem)) > 0


@pytest.mark.parametrize(
    "part",
    [
        AxisSlice(tensor="x", axis=0, width=3, offset=2),
        AxisSlice(tensor="x", axis=0, width=2, offset=1, repeat=2, stride=100, run=5, gap=7),
    ],
)
def test_indices_and_orders(part: AxisSlice) -> None:
    indices = on_both(part.indices, torch.tensor([0, 3, 8]))
    assert len(indices) == 3 * part.width * part.repeat
    order_I = torch.randperm(2 * NUM_UNITS, generator=torch.Generator().manual_seed(0))
    sums = make_problem(2, target=True, held_out=True).held_out
    on_both(lambda sums, order_I: sums.reordered(order_I), sums, order_I)
    on_both(lambda problem: problem.without_held_out(), make_problem(2, target=True, held_out=True))
    on_both(lambda problem: problem.total(), make_problem(2, target=True, held_out=True))


def test_damping_that_has_to_be_raised() -> None:
    """Attempts that fail leave nothing of the host either."""
    weight_OI = torch.randn(6, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram_II = weight_OI.T @ weight_OI
    gram_II.diagonal()[::3].sub_(1e-7)

    def run(gram_II: Tensor, right_OI: Tensor) -> list[Any]:
        factor = damped_cholesky(gram_II, 1e-10, "here")
        solution_OI = solved(factor.factor_NN, right_OI.clone())
        return [factor.num_raises, factor.delta, solution_OI, inverted(factor.factor_NN)]

    assert on_both(run, gram_II, weight_OI)[0] > 0


def test_rotation() -> None:
    x_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    weight_RD = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))

    def run(x_TD: Tensor, weight_RD: Tensor) -> list[Any]:
        gram_DD = x_TD.T @ x_TD
        basis_DK = principal_basis(gram_DD, 10, 1e-3, "here")
        return [
            basis_DK,
            dropped_share(gram_DD, basis_DK),
            rotated(weight_RD, basis_DK, 1, weight_RD[0]),
            rotated(weight_RD.T, basis_DK, 0),
            rotated(weight_RD[0], basis_DK, 0),
            angular_distance(x_TD, x_TD.flip(0)),
        ]

    on_both(run, x_TD, weight_RD)


@pytest.mark.parametrize(
    ("name", "target", "held_out"),
    [
        pytest.param(name, *sums, marks=pytest.mark.slow if name in SELECTORS and sums[0] != sums[1] else ())
        for name, *sums in product([*SCORES, *SELECTORS], [False, True], [False, True])
    ],
)
def test_workspace_is_what_the_entry_says(name: str, target: bool, held_out: bool) -> None:
    """To a twentieth of the Gram: numbers per unit and strips of rows are not in it; with held-out sums to a tenth."""
    num_units = 320
    problem = moved(make_problem(1, target=target, held_out=held_out, sensitivity=name == "loss", num_units=num_units))
    before = fake_device.allocated_bytes()
    fake_device.reset_peak()
    if name in SELECTORS:
        SELECTORS.get(name).keep(problem, num_units // 2)
    else:
        SCORES.get(name).score(problem)
    workspace = score_or_selector(name).workspace
    grams = (workspace.grams + (0.1 if held_out else 0.05)) * num_units**2 * 8
    consumers = workspace.consumers * num_units * NUM_OUTPUTS * 8
    assert fake_device.peak_bytes() - before <= grams + consumers


def test_nothing_stays_behind() -> None:
    problem = moved(make_problem(2, target=True, held_out=True))
    before = fake_device.allocated_bytes()
    keep_U = SELECTORS.get("greedy-swap").keep(problem, NUM_KEEP)
    result = SOLVERS.get("least-squares").solve(problem, keep_U)
    assert fake_device.allocated_bytes() - before == NUM_UNITS + NUM_OUTPUTS * NUM_KEEP * 2 * 4
    del keep_U, result
    assert fake_device.allocated_bytes() == before
