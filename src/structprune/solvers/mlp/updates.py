"""The updates of the split MLP block, one block of variables at a time; pure functions, each lowers the objective.

The block is relaxed with the consumer's input p, the pre-activations z and, if gated, the gate's s (StructPrune,
arXiv 2510.03246, published; it builds on SparseLLM, arXiv 2402.17946):

    J = beta |Y - W2 p - b2|^2 + gamma |p - link|^2 + alpha |z - W1 X - b1|^2 [+ alpha |s - Wg X - bg|^2]
    link = phi(z), or phi(s) * z if gated

Scaled duals only move the targets: the functions take a center (W1 X + b1 - v) and a target (p + u).
Shape suffixes: T tokens, D hidden, N kept channels, I inputs and O outputs of one affine map, A inputs and the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from structprune.errors import InputError
from structprune.linalg.cholesky import DampedCholesky, damped_cholesky, solved
from structprune.registry import Registry

_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBE = 0.044715
# Share of the decrease that the gradient promises which a step must make (Armijo).
_ARMIJO = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """Weights of the three kinds of terms. Only their ratios move the solution.

    From reference code: all 0.1 for OPT, all 5 for LLaMA.
    """

    alpha: float = 0.1
    beta: float = 0.1
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not min(self.alpha, self.beta, self.gamma) > 0:
            raise InputError("a penalty is not positive", got=(self.alpha, self.beta, self.gamma))


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """x -> W x + b, weight (O, I), bias (O,) or None."""

    weight_OI: Tensor
    bias_O: Tensor | None = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight_OI, self.bias_O)

    def with_ones(self, x_TI: Tensor) -> Tensor:
        """Append a column of ones to the inputs if there is a bias, (T, A): the bias is then one more column of W."""
        return x_TI if self.bias_O is None else torch.cat([x_TI, x_TI.new_ones(len(x_TI), 1)], dim=1)


def update_affine(affine: Affine, residual_OA: Tensor, factor: DampedCholesky) -> Affine:
    """Solve (a): min over V, c of sum_t |t - V x - c|^2 + delta (|V - W|^2 + |c - b|^2), in float64.

    V = W + R (G + delta I)^-1 with R = sum_t (t - W x - b) [x 1]^T taken at the current W, so nothing cancels, and G
    the Gram of [x 1], factored with delta. Published as W = t x^+ by pseudo-inverse; the Cholesky and the ridge toward
    the current weight (J cannot rise, no residual means no change) are derived.
    """
    change_OA = solved(factor.factor_NN, residual_OA.to(torch.float64, copy=True))
    num_inputs = affine.weight_OI.shape[1]
    weight_OI = affine.weight_OI + change_OA[:, :num_inputs]
    bias_O = None if affine.bias_O is None else (affine.bias_O + change_OA[:, num_inputs]).to(affine.bias_O.dtype)
    return Affine(weight_OI=weight_OI.to(affine.weight_OI.dtype), bias_O=bias_O)


def p_correction(down: Affine, penalties: Penalties) -> Tensor:
    """Compute M = (W2 W2^T + gamma/beta I)^-1 W2, (D, N), by one float64 Cholesky of order D: once per iteration."""
    weight_DN = down.weight_OI.to(torch.float64)
    shifted_DD = weight_DN @ weight_DN.T
    shifted_DD.diagonal().add_(penalties.gamma / penalties.beta)
    # The shift is part of the problem: damping would move the minimiser.
    factor = damped_cholesky(shifted_DD, 0.0, "p update")
    return torch.cholesky_solve(weight_DN, factor.factor_NN).to(down.weight_OI.dtype)


def update_p(link_TN: Tensor, y_TD: Tensor, down: Affine, correction_DN: Tensor) -> Tensor:
    """Solve (c): min over p of beta |y - W2 p - b2|^2 + gamma |p - link|^2.

    p = link + M^T (y - b2 - W2 link). Published as (beta W2^T W2 + gamma I)^-1 (beta W2^T (y - b2) + gamma link), a
    Cholesky of order N; this is the same by the push-through identity (derived), of order D < N, and 4 D N flops per
    token instead of 2 N^2 + 2 D N.
    """
    return torch.addmm(link_TN, y_TD - down(link_TN), correction_DN)


def relu_z(center: Tensor, target: Tensor, penalties: Penalties) -> Tensor:
    """Solve (d): min over z of alpha (z - center)^2 + gamma (target - max(z, 0))^2, exactly, elementwise.

    Each branch is a parabola cut at zero; the lower of the two minima wins (from reference code, checked by grid).
    """
    alpha, gamma = penalties.alpha, penalties.gamma
    active = ((gamma * target + alpha * center) / (gamma + alpha)).clamp(min=0)
    idle = center.clamp(max=0)
    active_loss = alpha * (active - center).square() + gamma * (target - active).square()
    idle_loss = alpha * (idle - center).square() + gamma * target.square()
    return torch.where(active_loss <= idle_loss, active, idle)


def gated_z(gate: Tensor, center: Tensor, target: Tensor, penalties: Penalties) -> Tensor:
    """Solve (d): min over z of alpha (z - center)^2 + gamma (target - gate z)^2, elementwise.

    With gate = phi(s) this is a parabola (published).
    """
    alpha, gamma = penalties.alpha, penalties.gamma
    return (alpha * center + gamma * gate * target) / (alpha + gamma * gate.square())


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """phi as data. `exact_z` is the minimiser of the z subproblem where there is a formula; None means Gauss-Newton."""

    name: str
    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    exact_z: Callable[[Tensor, Tensor, Penalties], Tensor] | None = None


def element_loss(
    activation: Activation, x: Tensor, center: Tensor, target: Tensor, scale: Tensor, penalties: Penalties
) -> Tensor:
    """Compute alpha (x - center)^2 + gamma (scale phi(x) - target)^2, elementwise."""
    fit = (scale * activation.value(x) - target).square()
    return penalties.alpha * (x - center).square() + penalties.gamma * fit


def gauss_newton(
    activation: Activation,
    x: Tensor,
    center: Tensor,
    target: Tensor,
    scale: Tensor,
    penalties: Penalties,
    *,
    max_halvings: int = 8,
) -> Tensor:
    """Take one damped Gauss-Newton step of (d) or (e) per element on `element_loss`; no element's loss rises.

    With r = scale phi(x) - target and J = scale phi'(x): x - t (alpha (x - center) + gamma J r) / (alpha + gamma J^2),
    t = 1, 1/2, 1/4, ... until the loss falls by a tenth of what the gradient promises (with a mere "does not rise" a
    step may jump to and fro across a GELU minimum); elements that never get there stay. For a gate x = s, scale = z;
    for an ungated phi x = z, scale = 1. Derived: the reference code's gradient descent with a fixed rate diverges where
    |z| is large. All tensors have the shape of x.
    """
    slope = scale * activation.derivative(x)
    gradient = penalties.alpha * (x - center) + penalties.gamma * slope * (scale * activation.value(x) - target)
    step = gradient / (penalties.alpha + penalties.gamma * slope.square())
    current = element_loss(activation, x, center, target, scale, penalties)
    promised = 2 * _ARMIJO * gradient * step
    new = x - step
    # "not <=" so that NaN counts as a rise.
    loss = element_loss(activation, new, center, target, scale, penalties)
    rising = torch.nonzero(~(loss <= current - promised), as_tuple=True)
    share = 1.0
    for _ in range(max_halvings):
        if len(rising[0]) == 0:
            break
        # Only the few elements left are gathered and tried again.
        share /= 2
        trial = x[rising] - share * step[rising]
        loss = element_loss(activation, trial, center[rising], target[rising], scale[rising], penalties)
        new[rising] = trial
        still = ~(loss <= current[rising] - share * promised[rising])
        rising = tuple(index[still] for index in rising)
    new[rising] = x[rising]
    return new


def _relu_derivative(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _silu_derivative(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _gelu_derivative(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2.0))) + x * density


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    tanh = torch.tanh(_TANH_SCALE * (x + _TANH_CUBE * x.pow(3)))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * x.square())


RELU = Activation(name="relu", value=torch.relu, derivative=_relu_derivative, exact_z=relu_z)
SILU = Activation(name="silu", value=F.silu, derivative=_silu_derivative)
GELU = Activation(name="gelu", value=F.gelu, derivative=_gelu_derivative)
GELU_TANH = Activation(name="gelu_tanh", value=_gelu_tanh, derivative=_gelu_tanh_derivative)

# The names of `hidden_act` in a checkpoint's config; whether the MLP is gated is said by its weights.
ACTIVATIONS: Registry[Activation] = Registry(
    "activation",
    Activation,
    {
        "relu": "structprune.solvers.mlp.updates:RELU",
        "silu": "structprune.solvers.mlp.updates:SILU",
        "swish": "structprune.solvers.mlp.updates:SILU",
        "gelu": "structprune.solvers.mlp.updates:GELU",
        "gelu_new": "structprune.solvers.mlp.updates:GELU_TANH",
        "gelu_fast": "structprune.solvers.mlp.updates:GELU_TANH",
        "gelu_tanh": "structprune.solvers.mlp.updates:GELU_TANH",
        "gelu_pytorch_tanh": "structprune.solvers.mlp.updates:GELU_TANH",
    },
)
