"""The split MLP solver: every update is a minimiser, the alternation descends, the guard keeps the better.

Shape suffixes: T tokens, D hidden, N kept channels, A inputs and the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structprune.errors import InputError, NumericalError
from structprune.linalg.cholesky import damped_cholesky
from structprune.solvers.mlp.admm import MlpOptions, reference_options, solve_mlp
from structprune.solvers.mlp.block import MlpTokens, MlpWeights, block_error
from structprune.solvers.mlp.iterate import IterateOptions, IterativeSolver, iterate
from structprune.solvers.mlp.updates import (
    ACTIVATIONS,
    GELU,
    GELU_TANH,
    RELU,
    SILU,
    Activation,
    Affine,
    Penalties,
    element_loss,
    gated_z,
    gauss_newton,
    p_correction,
    relu_z,
    update_affine,
    update_p,
)

PENALTIES = Penalties(alpha=0.3, beta=0.7, gamma=1.1)
F64 = torch.float64
# name -> (activation, gated, biased): ReLU as in OPT, SwiGLU as in LLaMA, GELU as in GPT-2, GeGLU as in Gemma
BLOCKS = {
    "relu": (RELU, False, True),
    "relu-unbiased": (RELU, False, False),
    "gelu": (GELU, False, True),
    "gelu-tanh": (GELU_TANH, False, False),
    "swiglu": (SILU, True, False),
    "swiglu-biased": (SILU, True, True),
    "geglu": (GELU_TANH, True, False),
}
elements = st.floats(-30, 30, allow_subnormal=False)


def rand(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def make_affine(num_outputs: int, num_inputs: int, biased: bool, seed: int, dtype: torch.dtype = F64) -> Affine:
    return Affine(
        weight_OI=rand(num_outputs, num_inputs, seed=seed, dtype=dtype) / num_inputs**0.5,
        bias_O=0.3 * rand(num_outputs, seed=seed + 1, dtype=dtype) if biased else None,
    )


def compact(weights: MlpWeights, num_kept: int) -> MlpWeights:
    """The first channels only: a mask without any refit."""

    def rows(affine: Affine) -> Affine:
        bias_O = None if affine.bias_O is None else affine.bias_O[:num_kept]
        return Affine(weight_OI=affine.weight_OI[:num_kept], bias_O=bias_O)

    return replace(
        weights,
        up=rows(weights.up),
        gate=None if weights.gate is None else rows(weights.gate),
        down=replace(weights.down, weight_OI=weights.down.weight_OI[:, :num_kept]),
    )


def make_problem(
    kind: str, *, num_tokens: int = 240, hidden: int = 6, kept: int = 14, seed: int = 0, dtype: torch.dtype = F64
) -> tuple[MlpTokens, MlpWeights]:
    """Tokens of a dense MLP of 20 channels, and its first `kept` channels."""
    activation, gated, biased = BLOCKS[kind]
    dense = MlpWeights(
        activation=activation,
        up=make_affine(20, hidden, biased, 11, dtype),
        gate=make_affine(20, hidden, biased, 21, dtype) if gated else None,
        down=make_affine(hidden, 20, biased, 31, dtype),
    )
    x_TD = 1.5 * rand(num_tokens, hidden, seed=seed, dtype=dtype)
    return MlpTokens(x_TD=x_TD, y_TD=dense.down(dense.hidden(x_TD))), compact(dense, kept)


def make_options(*, duals: bool = False, iterations: int = 6, chunk_tokens: int = 100) -> MlpOptions:
    loop = IterateOptions(max_iterations=iterations, rtol=0.0, patience=iterations)
    return MlpOptions(penalties=PENALTIES, damping=1e-3, duals=duals, chunk_tokens=chunk_tokens, loop=loop)


def assert_minimiser(loss: Callable[[Tensor], Tensor], x: Tensor, *, atol: float = 1e-8) -> None:
    """No random perturbation is lower, and central differences along random directions vanish."""
    lowest = float(loss(x))
    scale = max(1.0, lowest)
    for seed, size in enumerate([1e-4, 1e-2, 1.0, 10.0] * 5):
        direction = rand(*x.shape, seed=seed)
        assert float(loss(x + size * direction)) >= lowest - 1e-12 * scale
        slope = (float(loss(x + 1e-4 * direction)) - float(loss(x - 1e-4 * direction))) / 2e-4
        assert abs(slope) <= atol * scale + 1e-7


# --- the loop ---


def descend(values: list[float], options: IterateOptions) -> tuple[int, list[float], str]:
    """Run the loop over a given list of objectives; the state is the position."""
    solver = IterativeSolver(name="list", init=lambda: 0, step=lambda i: i + 1, objective=lambda i: values[i])
    result = iterate(solver, options)
    return result.best, result.history, result.status


def test_loop_stops_at_the_limit() -> None:
    assert descend([8, 4, 2, 1], IterateOptions(max_iterations=2)) == (2, [8, 4, 2], "iteration-limit")
    assert descend([8], IterateOptions(max_iterations=0)) == (0, [8], "iteration-limit")


def test_loop_converges_after_patience() -> None:
    values = [8, 4, 3.9999, 3.9998, 3.9997, 1]
    assert descend(values, IterateOptions(rtol=1e-3, patience=3)) == (4, values[:5], "converged")
    # Progress in between starts the count again.
    values = [8, 8, 4, 4, 2, 2, 2]
    assert descend(values, IterateOptions(patience=2)) == (4, values, "converged")


def test_loop_returns_the_best_after_a_rise() -> None:
    assert descend([8, 4, 5, 1], IterateOptions()) == (1, [8, 4, 5], "objective-rose")
    assert descend([8, 4, 4.0001, 1], IterateOptions(rtol=1e-3, max_iterations=3))[0] == 3
    assert descend([0, 1e-20, 1e-20], IterateOptions(atol=1e-12))[2] == "converged"


def test_loop_tolerates_rises_when_told() -> None:
    options = IterateOptions(rise_stops=False, patience=2)
    assert descend([8, 9, 4, 5, 6, 1], options) == (2, [8, 9, 4, 5, 6], "objective-rose")


def test_loop_and_values_that_are_not_finite() -> None:
    for bad in (math.nan, math.inf):
        best, _, status = descend([8, 4, bad, 1], IterateOptions(rise_stops=False))
        assert (best, status) == (1, "objective-rose")
        with pytest.raises(NumericalError, match="list: the objective is not finite"):
            descend([bad, 1], IterateOptions())


# --- the updates ---


@pytest.mark.parametrize("biased", [False, True])
def test_affine_update_minimises_the_proximal_least_squares(biased: bool) -> None:
    x_TI, target_TO, affine = rand(40, 5, seed=1), rand(40, 3, seed=2), make_affine(3, 5, biased, 3)
    x_TA = affine.with_ones(x_TI)
    factor = damped_cholesky(x_TA.T @ x_TA, 0.05, "test")
    new = update_affine(affine, (target_TO - affine(x_TI)).T @ x_TA, factor)

    def join(a: Affine) -> Tensor:
        return a.weight_OI if a.bias_O is None else torch.cat([a.weight_OI, a.bias_O[:, None]], dim=1)

    def loss(joined_OA: Tensor) -> Tensor:
        ridge = factor.delta * (joined_OA - join(affine)).square().sum()
        return (target_TO - x_TA @ joined_OA.T).square().sum() + ridge

    assert_minimiser(loss, join(new))


def test_affine_update_without_a_residual_changes_nothing() -> None:
    affine = make_affine(3, 5, True, 3, torch.float32)
    gram_AA = torch.zeros(6, 6)
    new = update_affine(affine, torch.zeros(3, 6), damped_cholesky(gram_AA, 0.1, "test"))
    assert torch.equal(new.weight_OI, affine.weight_OI)
    assert new.bias_O is not None
    assert affine.bias_O is not None
    assert torch.equal(new.bias_O, affine.bias_O)


@pytest.mark.parametrize("num_kept", [3, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_p_update_is_the_minimiser_and_the_published_formula(num_kept: int, biased: bool) -> None:
    """Also with fewer channels than hidden units."""
    link_TN, y_TD, down = rand(7, num_kept, seed=1), rand(7, 5, seed=2), make_affine(5, num_kept, biased, 3)
    p_TN = update_p(link_TN, y_TD, down, p_correction(down, PENALTIES))
    bias_D = torch.zeros(5, dtype=F64) if down.bias_O is None else down.bias_O
    weight_DN = down.weight_OI
    system_NN = PENALTIES.beta * weight_DN.T @ weight_DN + PENALTIES.gamma * torch.eye(num_kept, dtype=F64)
    right_TN = PENALTIES.beta * (y_TD - bias_D) @ weight_DN + PENALTIES.gamma * link_TN
    torch.testing.assert_close(p_TN, torch.linalg.solve(system_NN, right_TN.T).T, rtol=1e-11, atol=1e-11)

    def loss(p: Tensor) -> Tensor:
        return PENALTIES.beta * (y_TD - down(p)).square().sum() + PENALTIES.gamma * (p - link_TN).square().sum()

    assert_minimiser(loss, p_TN)


@settings(deadline=None, max_examples=100)
@given(center=elements, target=elements, alpha=st.floats(0.05, 5), gamma=st.floats(0.05, 5))
def test_relu_z_beats_a_grid(center: float, target: float, alpha: float, gamma: float) -> None:
    def loss(z: Tensor) -> Tensor:
        return alpha * (z - center).square() + gamma * (target - z.clamp(min=0)).square()

    penalties = Penalties(alpha=alpha, beta=1, gamma=gamma)
    z = relu_z(torch.tensor(center, dtype=F64), torch.tensor(target, dtype=F64), penalties)
    grid = torch.linspace(-62, 62, 100_001, dtype=F64)
    lowest = float(loss(grid).min())
    assert float(loss(z)) <= lowest * (1 + 1e-12) + 1e-12
    # And it is no lower than a grid that fine can be wrong by.
    assert float(loss(z)) >= lowest - (alpha + gamma) * 130 * 1.24e-3


@settings(deadline=None, max_examples=60)
@given(center=elements, target=elements, gate=st.floats(-5, 1e3))
def test_gated_z_minimises(center: float, target: float, gate: float) -> None:
    center_z, target_z, gate_z = (torch.tensor([v], dtype=F64) for v in (center, target, gate))
    z = gated_z(gate_z, center_z, target_z, PENALTIES)

    def loss(x: Tensor) -> Tensor:
        return (PENALTIES.alpha * (x - center_z).square() + PENALTIES.gamma * (target_z - gate_z * x).square()).sum()

    gradient = 2 * PENALTIES.alpha * (z - center_z) - 2 * PENALTIES.gamma * gate_z * (target_z - gate_z * z)
    size = abs(center) + (abs(target) + abs(gate) * float(z.abs())) * abs(gate) + 1
    assert abs(float(gradient)) <= 1e-11 * size
    for step in (1e-3, 1e-1, 10.0):
        assert float(loss(z)) <= min(float(loss(z + step)), float(loss(z - step)))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activation_and_its_derivative(name: str) -> None:
    activation = ACTIVATIONS.get(name)
    x = torch.linspace(-9, 9, 400, dtype=F64)  # an even number of points: none at ReLU's kink
    slope = (activation.value(x + 1e-6) - activation.value(x - 1e-6)) / 2e-6
    torch.testing.assert_close(activation.derivative(x), slope, rtol=1e-7, atol=1e-8)
    # Far out, in the precision that is used: no overflow, no NaN.
    far = torch.tensor([-1e6, -1e3, -88.0, 0.0, 88.0, 1e3, 1e6])
    torch.testing.assert_close(activation.value(far), far.clamp(min=0))
    assert torch.isfinite(activation.derivative(far)).all()


def test_unknown_activation() -> None:
    with pytest.raises(InputError, match="Did you mean 'gelu'"):
        ACTIVATIONS.get("gellu")
    with pytest.raises(InputError, match="penalty"):
        Penalties(beta=0)


@pytest.mark.parametrize("activation", [SILU, GELU, GELU_TANH, RELU], ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([0.3, 3.0, 100.0, 1e4, 1e6]), halvings=st.integers(0, 8))
def test_gauss_newton_never_raises_an_element(
    activation: Activation, dtype: torch.dtype, seed: int, size: float, halvings: int
) -> None:
    """Also where the scale is a million, where a gradient step of fixed rate diverges."""
    x, center, target, scale = (rand(64, seed=seed + i, dtype=dtype) for i in range(4))
    x, center, target, scale = 3 * x, 3 * center, size * target, size * scale
    before = element_loss(activation, x, center, target, scale, PENALTIES)
    for _ in range(3):
        x = gauss_newton(activation, x, center, target, scale, PENALTIES, max_halvings=halvings)
        after = element_loss(activation, x, center, target, scale, PENALTIES)
        assert torch.isfinite(x).all()
        # A halved element was judged inside a gather, where a vectorised phi (1 + erf, 1 + tanh) may round differently.
        noise = 8 * torch.finfo(dtype).eps * ((scale * x).abs() + target.abs())
        assert (after.sqrt() <= before.sqrt() * (1 + 4 * torch.finfo(dtype).eps) + noise).all()
        before = after


@pytest.mark.parametrize("activation", [SILU, GELU, GELU_TANH], ids=lambda a: a.name)
@pytest.mark.parametrize("scaled", [False, True])
def test_gauss_newton_arrives_at_a_local_minimum(activation: Activation, scaled: bool) -> None:
    x, center, target, scale = (2 * rand(50, seed=i) for i in range(4))
    scale = scale if scaled else torch.ones_like(scale)
    for _ in range(100):
        x = gauss_newton(activation, x, center, target, scale, PENALTIES, max_halvings=30)

    def loss(value: Tensor) -> Tensor:
        return element_loss(activation, value, center, target, scale, PENALTIES)

    gradient = (loss(x + 1e-5) - loss(x - 1e-5)) / 2e-5
    assert float(gradient.abs().max()) < 1e-6
    for step in (-1e-3, 1e-3):
        assert (loss(x + step) >= loss(x) - 1e-12).all()


def test_gauss_newton_with_a_large_multiplier_closes_the_gap() -> None:
    """z = 1000: six steps from s = 2 to a target of 0.5 z; descent of rate 0.1 would go to infinity."""
    z = torch.full((1,), 1000.0, dtype=F64)
    s = center = torch.full((1,), 2.0, dtype=F64)
    target = 0.5 * z
    for _ in range(6):
        s = gauss_newton(SILU, s, center, target, z, PENALTIES)
    assert float((SILU.value(s) * z - target).abs()) < 0.01


# --- the alternation ---


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_objective_does_not_rise_and_the_block_gets_better(kind: str, dtype: torch.dtype) -> None:
    tokens, weights = make_problem(kind, dtype=dtype)
    options = make_options(iterations=12)
    solution = solve_mlp(tokens, weights, options)
    assert len(solution.history) == 13
    start = block_error(tokens, weights)
    assert solution.history[0] == pytest.approx(PENALTIES.beta * start, rel=1e-6)
    assert all(b <= a * (1 + 1e-6) for a, b in zip(solution.history, solution.history[1:], strict=False))
    assert solution.history[-1] < 0.2 * solution.history[0]
    assert solution.statistics["block_error_start"] == pytest.approx(start, rel=1e-6)
    assert solution.statistics["block_error"] == pytest.approx(block_error(tokens, solution.weights), rel=1e-6)
    refitted = solve_mlp(tokens, weights, replace(options, loop=IterateOptions(max_iterations=0)))
    assert refitted.history == solution.history[:1]
    assert torch.equal(refitted.weights.up.weight_OI, weights.up.weight_OI)
    # Mask < least squares < moving the producers too.
    assert refitted.statistics["block_error"] < start
    assert solution.statistics["block_error"] < refitted.statistics["block_error"]
    assert solution.weights.up.weight_OI.dtype == dtype
    assert solution.weights.down.weight_OI.dtype == dtype


def naive_objectives(
    tokens: MlpTokens, weights: MlpWeights, iterations: int, damping: float, duals: bool
) -> list[float]:
    """The note's iteration, written out over all tokens with dense solves."""
    a, b, c = PENALTIES.alpha, PENALTIES.beta, PENALTIES.gamma
    x, y, phi = tokens.x_TD, tokens.y_TD, weights.activation.value
    up, gate, down = weights.up.weight_OI, weights.gate.weight_OI if weights.gate else None, weights.down.weight_OI

    def fit(weight: Tensor, inputs: Tensor, target: Tensor) -> Tensor:
        gram = inputs.T @ inputs
        ridge = damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=F64)
        return torch.linalg.solve(gram + ridge, inputs.T @ target + ridge @ weight.T).T

    def link(z: Tensor, s: Tensor | None) -> Tensor:
        return phi(z) if s is None else phi(s) * z

    z, s = x @ up.T, None if gate is None else x @ gate.T
    u, v, w = (torch.zeros_like(z) for _ in range(3))
    objectives = [float(b * (y - link(z, s) @ down.T).square().sum())]
    for _ in range(iterations):
        center, target_link = x @ up.T - v, link(z, s) - u
        eye = torch.eye(down.shape[1], dtype=F64)
        p = torch.linalg.solve(b * down.T @ down + c * eye, (b * y @ down + c * target_link).T).T
        if s is None or gate is None:
            z = relu_z(center, p + u, PENALTIES)
        else:
            z = gated_z(phi(s), center, p + u, PENALTIES)
            for _ in range(2):
                s = gauss_newton(weights.activation, s, x @ gate.T - w, p + u, z, PENALTIES)
        gap = p - link(z, s)
        penalty = b * (y - p @ down.T).square().sum() + c * gap.square().sum() + a * (z - x @ up.T).square().sum()
        if s is not None and gate is not None:
            penalty += a * (s - x @ gate.T).square().sum()
        real = link(x @ up.T, None if gate is None else x @ gate.T)
        objectives.append(float(b * (y - real @ down.T).square().sum() if duals else penalty))
        if duals:
            u, v = u + gap, v + z - x @ up.T
            w = w if s is None or gate is None else w + s - x @ gate.T
        up, down = fit(up, x, z + v), fit(down, p, y)
        gate = None if s is None or gate is None else fit(gate, x, s + w)
    return objectives


@pytest.mark.parametrize("kind", ["relu-unbiased", "swiglu"])
@pytest.mark.parametrize("duals", [False, True])
def test_history_equals_the_note_written_out(kind: str, duals: bool) -> None:
    tokens, weights = make_problem(kind)
    options = make_options(duals=duals, iterations=4, chunk_tokens=77)
    expected = naive_objectives(tokens, weights, 4, options.damping, duals)
    assert solve_mlp(tokens, weights, options).history == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("duals", [False, True])
def test_chunks_do_not_change_the_answer(kind: str, duals: bool) -> None:
    tokens, weights = make_problem(kind)
    before = [t.clone() for t in (tokens.x_TD, tokens.y_TD, weights.up.weight_OI, weights.down.weight_OI)]
    whole = solve_mlp(tokens, weights, make_options(duals=duals, chunk_tokens=10_000))
    parts = solve_mlp(tokens, weights, make_options(duals=duals, chunk_tokens=17))
    again = solve_mlp(tokens, weights, make_options(duals=duals, chunk_tokens=17))
    assert parts.history == pytest.approx(whole.history, rel=1e-9)
    torch.testing.assert_close(parts.weights.up.weight_OI, whole.weights.up.weight_OI, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(parts.weights.down.weight_OI, whole.weights.down.weight_OI, rtol=1e-7, atol=1e-8)
    assert parts.history == again.history
    assert torch.equal(parts.weights.down.weight_OI, again.weights.down.weight_OI)
    after = (tokens.x_TD, tokens.y_TD, weights.up.weight_OI, weights.down.weight_OI)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_duals_run_and_return_the_best_seen(kind: str) -> None:
    tokens, weights = make_problem(kind)
    loop = IterateOptions(max_iterations=8, patience=1)  # a short patience would end at the first, idle sweep
    solution = solve_mlp(tokens, weights, replace(make_options(duals=True), loop=loop))
    assert len(solution.history) == 9
    assert all(math.isfinite(value) for value in solution.history)
    # The first sweep's weights are the given ones.
    assert solution.history[1] == pytest.approx(solution.history[0])
    assert solution.statistics["block_error"] < solution.statistics["block_error_start"]


def test_consumer_is_refitted_on_the_real_activations() -> None:
    tokens, weights = make_problem("relu")
    options = make_options(iterations=3)
    solved = solve_mlp(tokens, weights, options).weights
    hidden_TA = solved.down.with_ones(solved.hidden(tokens.x_TD))
    gram_AA = hidden_TA.T @ hidden_TA
    assert solved.down.bias_O is not None
    assert weights.down.bias_O is not None
    change_DA = torch.cat(
        [
            solved.down.weight_OI - weights.down.weight_OI,
            (solved.down.bias_O - weights.down.bias_O)[:, None],
        ],
        dim=1,
    )
    error_TD = tokens.y_TD - solved.down(solved.hidden(tokens.x_TD))
    gradient_DA = options.damping * gram_AA.diagonal().mean() * change_DA - error_TD.T @ hidden_TA
    torch.testing.assert_close(gradient_DA, torch.zeros_like(gradient_DA), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_a_block_without_error_stays(kind: str, dtype: torch.dtype) -> None:
    tokens, weights = make_problem(kind, kept=20, dtype=dtype)
    solution = solve_mlp(tokens, weights)
    assert solution.status == "converged"
    atol = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(solution.weights.up.weight_OI, weights.up.weight_OI, rtol=0, atol=atol)
    torch.testing.assert_close(solution.weights.down.weight_OI, weights.down.weight_OI, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["relu", "gelu", "swiglu", "geglu"])
@pytest.mark.parametrize("duals", [False, True])
@pytest.mark.parametrize("scale", [1e2, 1e3])
def test_large_pre_activations_do_not_diverge(kind: str, duals: bool, scale: float) -> None:
    tokens, weights = make_problem(kind, dtype=torch.float32)
    x_TD = tokens.x_TD.clone()
    x_TD[::10] *= scale  # massive activations on some tokens
    _, dense = make_problem(kind, kept=20, dtype=torch.float32)
    tokens = MlpTokens(x_TD=x_TD, y_TD=dense.down(dense.hidden(x_TD)))
    solution = solve_mlp(tokens, weights, make_options(duals=duals))
    assert all(math.isfinite(value) for value in solution.history)
    if not duals:
        assert all(b <= a * (1 + 1e-5) for a, b in zip(solution.history, solution.history[1:], strict=False))
    assert solution.statistics["block_error"] < solution.statistics["block_error_start"]


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(list(BLOCKS)),
    num_tokens=st.integers(1, 30),
    kept=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_any_shape_descends(kind: str, num_tokens: int, kept: int, seed: int) -> None:
    """Also fewer tokens than channels, and fewer channels than hidden units."""
    tokens, weights = make_problem(kind, num_tokens=num_tokens, kept=kept, seed=seed)
    solution = solve_mlp(tokens, weights, replace(make_options(), chunk_tokens=7))
    slack = 1e-10 * float(tokens.y_TD.square().sum())
    assert all(b <= a + slack for a, b in zip(solution.history, solution.history[1:], strict=False))
    assert all(torch.isfinite(t).all() for t in (solution.weights.up.weight_OI, solution.weights.down.weight_OI))
    assert solution.statistics["damping"] >= 1e-3


def test_reference_defaults() -> None:
    _, relu = make_problem("relu")
    _, swiglu = make_problem("swiglu")
    assert reference_options(relu).loop.max_iterations == 4
    assert reference_options(swiglu).loop.max_iterations == 8
    assert reference_options(swiglu).penalties == Penalties(alpha=5, beta=5, gamma=5)


def test_only_the_ratios_of_the_penalties_count() -> None:
    tokens, weights = make_problem("swiglu")
    one, ten = (
        solve_mlp(
            tokens, weights, replace(make_options(iterations=3), penalties=Penalties(alpha=k, beta=2 * k, gamma=3 * k))
        )
        for k in (1.0, 10.0)
    )
    torch.testing.assert_close(one.weights.down.weight_OI, ten.weights.down.weight_OI, rtol=1e-8, atol=1e-9)


def test_not_finite_tokens_are_an_error() -> None:
    tokens, weights = make_problem("relu")
    tokens.y_TD[3, 0] = math.nan
    with pytest.raises(NumericalError, match="not finite"):
        solve_mlp(tokens, weights)
