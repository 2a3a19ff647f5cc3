"""Alternating minimisation: the operator by differences, its solution by a direct solve, a falling error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structprune.solvers.mlp.alternating import AlternatingOptions, _moved, _UpOperator, alternate
from structprune.solvers.mlp.block import MlpTokens, MlpWeights, block_error
from structprune.solvers.mlp.iterate import IterateOptions
from structprune.solvers.mlp.updates import ACTIVATIONS, Affine

FORMS = [("silu", True, False), ("relu", False, True), ("gelu", False, True), ("relu", False, False)]


def problem(
    activation: str, gated: bool, biased: bool, num_tokens: int = 60, seed: int = 0
) -> tuple[MlpTokens, MlpWeights]:
    """A block of 5 hidden and 4 channels, asked for the output of one with 7 channels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def affine(num_outputs: int, num_inputs: int) -> Affine:
        return Affine(weight_OI=draw(num_outputs, num_inputs), bias_O=draw(num_outputs) if biased else None)

    whole = MlpWeights(
        activation=ACTIVATIONS.get(activation), up=affine(7, 5), gate=affine(7, 5) if gated else None, down=affine(5, 7)
    )
    x_TD = draw(num_tokens, 5)
    y_TD = whole.down(whole.hidden(x_TD))

    def cut(given: Affine | None) -> Affine | None:
        if given is None:
            return None
        return Affine(weight_OI=given.weight_OI[:4], bias_O=None if given.bias_O is None else given.bias_O[:4])

    up, gate = cut(whole.up), cut(whole.gate)
    assert up is not None
    down = Affine(weight_OI=whole.down.weight_OI[:, :4], bias_O=whole.down.bias_O)
    return MlpTokens(x_TD=x_TD, y_TD=y_TD), MlpWeights(activation=whole.activation, up=up, gate=gate, down=down)


def explicit(operator: _UpOperator) -> Tensor:
    """The operator as a matrix (T D, N A), column by column, by differences of the true output."""
    tokens, weights = operator.tokens, operator.weights
    columns: list[Tensor] = []
    step = 1e-6
    for index in range(operator.shape[0] * operator.shape[1]):
        change = torch.zeros(operator.shape[0] * operator.shape[1], dtype=torch.float64)
        change[index] = step
        moved, back = (_moved(weights.up, sign * change.reshape(operator.shape)) for sign in (1, -1))
        outputs: list[Tensor] = []
        for up in (moved, back):
            trial = MlpWeights(activation=weights.activation, up=up, gate=weights.gate, down=weights.down)
            outputs.append(trial.down(trial.hidden(tokens.x_TD)))
        columns.append((outputs[0] - outputs[1]).flatten() / (2 * step))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(("activation", "gated", "biased"), FORMS)
@pytest.mark.parametrize("chunk_tokens", [7, 2048])
def test_conjugate_gradients_solve_the_normal_equations(
    activation: str, gated: bool, biased: bool, chunk_tokens: int
) -> None:
    tokens, weights = problem(activation, gated, biased)
    operator = _UpOperator(tokens, weights, AlternatingOptions(chunk_tokens=chunk_tokens))
    matrix = explicit(operator)
    residual = (tokens.y_TD - weights.down(weights.hidden(tokens.x_TD))).flatten()
    normal = matrix.T @ matrix
    assert operator.ridge == pytest.approx(1e-2 * float(normal.diagonal().mean()), rel=1e-5)
    torch.testing.assert_close(operator.residual_moment().flatten(), matrix.T @ residual, rtol=1e-5, atol=1e-5)
    normal.diagonal().add_(operator.ridge)
    expected = torch.linalg.solve(normal, matrix.T @ residual)
    found = operator.solve(num_steps=200).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("activation", "gated", "biased"), FORMS)
def test_the_error_falls_and_is_the_true_one(activation: str, gated: bool, biased: bool) -> None:
    tokens, weights = problem(activation, gated, biased)
    before = weights.up.weight_OI.clone()
    options = AlternatingOptions(loop=IterateOptions(max_iterations=5))
    solution = alternate(tokens, weights, options)
    assert solution.history[0] == pytest.approx(block_error(tokens, weights))
    assert all(b <= a for a, b in zip(solution.history[:-1], solution.history[1:], strict=True))
    assert block_error(tokens, solution.weights) == pytest.approx(min(solution.history))
    assert min(solution.history) < 0.9 * solution.history[0]
    assert torch.equal(weights.up.weight_OI, before)
    again = alternate(tokens, weights, options)
    assert again.history == solution.history


def test_the_gate_stays() -> None:
    tokens, weights = problem("silu", True, False)
    assert alternate(tokens, weights).weights.gate is weights.gate


def test_a_perfect_fit_stays() -> None:
    _, weights = problem("silu", True, False)
    x_TD = torch.randn(30, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens = MlpTokens(x_TD=x_TD, y_TD=weights.down(weights.hidden(x_TD)))
    solution = alternate(tokens, weights)
    assert solution.history[0] == 0
    torch.testing.assert_close(solution.weights.up.weight_OI, weights.up.weight_OI)
