"""Alternating minimisation of one pruned MLP: consumer by least squares, up by conjugate gradients, the gate frozen.

Reconstructed after SPAP (arXiv 2505.03373), whose text says that weights are updated by alternating minimisation on the
splittable structure of the MLP; the operator, its adjoint and the number of steps are not from the paper.

    min over U, V of sum_t |y - V (h * (U x))|^2 + ridges toward the start,   h = phi(gate x), fixed

Without a gate h is phi'(z) at the current z = U x + b (Gauss-Newton; for ReLU the active set is fixed), and the step is
halved until the true error falls.
Shape suffixes: T tokens, D hidden, N kept channels, A inputs and the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from structprune.linalg.cholesky import damped_cholesky
from structprune.solvers.least_squares import judged_least_squares
from structprune.solvers.mlp.block import CHUNK_TOKENS, MlpSolution, MlpTokens, MlpWeights, block_error, zero_sum
from structprune.solvers.mlp.iterate import IterateOptions, IterativeSolver, iterate
from structprune.solvers.mlp.updates import Affine, update_affine
from structprune.solvers.solver import Solver

_MAX_HALVINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class AlternatingOptions:
    """Settings of `alternate`."""

    damping: float = 1e-2
    """Ridge of both weights toward the current ones, as a share of the mean diagonal of their normal equations."""
    cg_steps: int = 10
    chunk_tokens: int = CHUNK_TOKENS
    loop: IterateOptions = field(default_factory=lambda: IterateOptions(max_iterations=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    weights: MlpWeights
    error: float
    """sum_t |y - MLP(x)|^2, the true one."""


@torch.no_grad()
def alternate(tokens: MlpTokens, weights: MlpWeights, options: AlternatingOptions | None = None) -> MlpSolution:
    """Move up and consumer in turn from `weights`; the recorded objective is the true error and does not rise.

    Deterministic; `tokens` and `weights` are left alone. Raises NumericalError if a Gram stays indefinite.
    """
    options = options or AlternatingOptions()
    start = block_error(tokens, weights, options.chunk_tokens)

    def step(state: _State) -> _State:
        moved = _update_up(tokens, state, options)
        down = _update_down(tokens, moved.weights, options)
        refitted = replace(moved.weights, down=down)
        error = block_error(tokens, refitted, options.chunk_tokens)
        return _State(weights=refitted, error=error) if error <= moved.error else moved

    solver = IterativeSolver(
        name="alternating minimisation of an MLP",
        init=lambda: _State(weights=weights, error=start),
        step=step,
        objective=lambda state: state.error,
    )
    result = iterate(solver, options.loop)
    return MlpSolution(
        weights=result.best.weights,
        history=result.history,
        status=result.status,
        statistics={
            "iterations": len(result.history) - 1.0,
            "block_error_start": start,
            "block_error": result.best.error,
        },
    )


def _update_up(tokens: MlpTokens, state: _State, options: AlternatingOptions) -> _State:
    """Update the up projection: conjugate gradients on the linearised error, then the longest step that lowers it."""
    operator = _UpOperator(tokens, state.weights, options)
    change_NA = operator.solve(options.cg_steps)
    share = 1.0
    for _ in range(_MAX_HALVINGS):
        trial = replace(state.weights, up=_moved(state.weights.up, share * change_NA))
        error = block_error(tokens, trial, options.chunk_tokens)
        if error < state.error:
            return _State(weights=trial, error=error)
        share /= 2
    return state


def _moved(affine: Affine, change_NA: Tensor) -> Affine:
    num_inputs = affine.weight_OI.shape[1]
    bias_O = None if affine.bias_O is None else affine.bias_O + change_NA[:, num_inputs].to(affine.bias_O.dtype)
    return Affine(weight_OI=affine.weight_OI + change_NA[:, :num_inputs].to(affine.weight_OI.dtype), bias_O=bias_O)


class _UpOperator:
    """dU -> the change of the MLP's output to first order in dU: exact with a gate, Gauss-Newton without."""

    def __init__(self, tokens: MlpTokens, weights: MlpWeights, options: AlternatingOptions) -> None:
        self.tokens, self.weights, self.chunk_tokens = tokens, weights, options.chunk_tokens
        order = weights.up.weight_OI.shape[1] + (weights.up.bias_O is not None)
        self.shape = (len(weights.up.weight_OI), order)
        # The mean diagonal of A^T A is sum_t sum_n (h_tn^2 |V_n|^2) |x_t|^2 over the number of unknowns.
        norm_N = weights.down.weight_OI.square().sum(dim=0)
        trace = zero_sum(tokens)
        # h of all tokens: every step of the conjugate gradients reads it twice.
        self.slope_TN = tokens.x_TD.new_empty(len(tokens.x_TD), self.shape[0])
        for rows in tokens.chunks(self.chunk_tokens):
            self.slope_TN[rows] = slope_TN = self._slope(rows)
            size_T = weights.up.with_ones(tokens.x_TD[rows]).square().sum(dim=1)
            trace += ((slope_TN.square() @ norm_N) * size_T).sum(dtype=torch.float64)
        self.ridge = options.damping * float(tokens.add_up(trace)) / (self.shape[0] * self.shape[1])

    def _slope(self, rows: slice) -> Tensor:
        weights, x_TD = self.weights, self.tokens.x_TD[rows]
        if weights.gate is not None:
            return weights.activation.value(weights.gate(x_TD))
        return weights.activation.derivative(weights.up(x_TD))

    def residual_moment(self) -> Tensor:
        """Return A^T r for the current residual r = y - MLP(x), (N, A) in float64."""
        total_NA = torch.zeros(self.shape, dtype=torch.float64, device=self.tokens.x_TD.device)
        for rows in self.tokens.chunks(self.chunk_tokens):
            x_TD = self.tokens.x_TD[rows]
            residual_TD = self.tokens.y_TD[rows] - self.weights.down(self.weights.hidden(x_TD))
            total_NA += self._adjoint(rows, residual_TD)
        return self.tokens.add_up(total_NA)

    def normal(self, change_NA: Tensor) -> Tensor:
        """Return (A^T A + ridge I) dU, (N, A) in float64."""
        # The ridge is there once, however many add up.
        total_NA = self.ridge / self.tokens.num_holders * change_NA
        change = change_NA.to(self.tokens.x_TD.dtype)
        down_DN = self.weights.down.weight_OI
        for rows in self.tokens.chunks(self.chunk_tokens):
            x_TA = self.weights.up.with_ones(self.tokens.x_TD[rows])
            output_TD = (self.slope_TN[rows] * (x_TA @ change.T)) @ down_DN.T
            total_NA += self._adjoint(rows, output_TD)
        return self.tokens.add_up(total_NA)

    def _adjoint(self, rows: slice, output_TD: Tensor) -> Tensor:
        x_TA = self.weights.up.with_ones(self.tokens.x_TD[rows])
        return ((self.slope_TN[rows] * (output_TD @ self.weights.down.weight_OI)).T @ x_TA).to(torch.float64)

    def solve(self, num_steps: int) -> Tensor:
        """Run conjugate gradients from zero: every step lowers the ridge objective of the linearised problem."""
        residual = self.residual_moment()
        change = torch.zeros_like(residual)
        direction = residual.clone()
        square = float(residual.square().sum())
        first = square
        for _ in range(num_steps):
            if square <= 1e-12 * first:
                break
            product = self.normal(direction)
            length = square / float((direction * product).sum())
            change += length * direction
            residual -= length * product
            previous, square = square, float(residual.square().sum())
            direction = residual + (square / previous) * direction
        return change


def _update_down(tokens: MlpTokens, weights: MlpWeights, options: AlternatingOptions) -> Affine:
    """Refit the consumer behind the new up projection, with a ridge toward the current consumer."""
    down = weights.down
    order = down.weight_OI.shape[1] + (down.bias_O is not None)
    gram_AA = torch.zeros(order, order, dtype=torch.float64, device=tokens.x_TD.device)
    residual_DA = torch.zeros(len(down.weight_OI), order, dtype=torch.float64, device=tokens.x_TD.device)
    for rows in tokens.chunks(options.chunk_tokens):
        hidden_TN = weights.hidden(tokens.x_TD[rows])
        hidden_TA = down.with_ones(hidden_TN)
        gram_AA += hidden_TA.T @ hidden_TA
        residual_DA += (tokens.y_TD[rows] - down(hidden_TN)).T @ hidden_TA
    tokens.add_up(gram_AA)
    tokens.add_up(residual_DA)
    return update_affine(down, residual_DA, damped_cholesky(gram_AA, options.damping, "refit of the consumer"))


ALTERNATING = Solver(
    solve=judged_least_squares,
    propose=alternate,
    reads={"gram", "tokens"},
    changes={"consumer", "producers"},
    num_latents=1,
)
