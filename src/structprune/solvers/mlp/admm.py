"""Penalty / ADMM alternating minimisation of one pruned MLP block (StructPrune, arXiv 2510.03246).

`solve_mlp` starts from weights that are already cut to the kept channels (and usually refitted by least squares) and
moves all of them. The split and its updates are published; the order and "iteration 0 does not refit" are from
reference code; the streaming, the proximal ridge, the scaled duals and the guards are derived. The updates themselves
are in mlp_updates.py.

Between iterations only z (and s, and the duals) live for all tokens; p is an explicit function of them and exists for
one chunk of tokens at a time. Tensors are float32 or wider; a chunk's products are taken in that dtype and summed in
float64, and every factorisation and solve is float64.
Shape suffixes: T tokens, D hidden, N kept channels, I inputs and O outputs of one affine map, A inputs and the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from structprune.linalg.cholesky import DampedCholesky, damped_cholesky
from structprune.linalg.gram_products import energy
from structprune.solvers.least_squares import judged_least_squares
from structprune.solvers.mlp.block import (
    CHUNK_TOKENS,
    MlpSolution,
    MlpTokens,
    MlpWeights,
    block_error,
    zero_sum,
)
from structprune.solvers.mlp.iterate import IterateOptions, IterativeSolver, iterate
from structprune.solvers.mlp.updates import (
    Activation,
    Affine,
    Penalties,
    gated_z,
    gauss_newton,
    p_correction,
    update_affine,
    update_p,
)
from structprune.solvers.solver import Solver


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpOptions:
    """Settings of `solve_mlp`; the defaults are OPT's in the reference code (`reference_options` for LLaMA's)."""

    penalties: Penalties = field(default_factory=Penalties)
    damping: float = 1e-2
    """Ridge of the weight updates toward the current weights, as a share of the Gram's mean diagonal."""
    duals: bool = False
    """Scaled duals: ADMM instead of a pure penalty. The recorded objective is then beta * (true block error).

    That error may rise for some iterations before it falls, so the loop runs to its limit and keeps the best.
    """
    inner_steps: int = 2
    """Gauss-Newton steps per iteration where z or s has no closed form."""
    chunk_tokens: int = CHUNK_TOKENS
    loop: IterateOptions = field(default_factory=lambda: IterateOptions(max_iterations=4))


def reference_options(weights: MlpWeights) -> MlpOptions:
    """Return the reference code's penalty and iterations: 0.1 and 4 for OPT, 5 and 8 for the gated LLaMA family."""
    if weights.gate is None:
        return MlpOptions()
    return MlpOptions(penalties=Penalties(alpha=5, beta=5, gamma=5), loop=IterateOptions(max_iterations=8))


def solve_mlp_with_duals(tokens: MlpTokens, weights: MlpWeights) -> MlpSolution:
    """Run `solve_mlp` as ADMM proper, with scaled duals."""
    return solve_mlp(tokens, weights, replace(reference_options(weights), duals=True))


@torch.no_grad()
def solve_mlp(tokens: MlpTokens, weights: MlpWeights, options: MlpOptions | None = None) -> MlpSolution:
    """Alternate (c) p, (d) z, (e) s, (a) weights from `weights`; finish with (f) the consumer's refit.

    The recorded objective is J of the note, which does not rise (without duals); a rise beyond round-off ends the loop.
    Deterministic; `tokens` and `weights` are left alone. The statistics also have damping (the largest that a weight
    update took) and damping_raises. Raises NumericalError if a Gram stays indefinite.
    """
    options = options or reference_options(weights)
    x_factor = _input_factor(tokens, weights.up, options)
    latents = _Latents.at(tokens, weights, options)
    start, roundoff = _start(tokens, weights, latents, options, x_factor)
    solver = IterativeSolver(
        name="ADMM of an MLP",
        init=lambda: start,
        step=lambda state: _sweep(tokens, state, latents, options, x_factor),
        objective=lambda state: state.objective,
    )
    loop = replace(options.loop, atol=max(options.loop.atol, roundoff))
    if options.duals:
        loop = replace(loop, rise_stops=False, patience=loop.max_iterations)
    result = iterate(solver, loop)
    # The consumer is pulled toward the given one, not toward the one that was fitted to p.
    moved = replace(result.best.refitted, down=weights.down)
    down, factor = _refit_down(tokens, moved, options)
    solved = replace(moved, down=down)
    return MlpSolution(
        weights=solved,
        history=result.history,
        status=result.status,
        statistics={
            "iterations": len(result.history) - 1.0,
            "block_error_start": start.objective / options.penalties.beta,
            "block_error": block_error(tokens, solved, options.chunk_tokens),
            "damping": max(result.best.damping, factor.damping),
            "damping_raises": float(result.best.damping_raises + factor.num_raises),
        },
    )


@dataclass(slots=True, kw_only=True)
class _Latents:
    """Split variables and scaled duals of all tokens, overwritten chunk by chunk: they belong to the newest state.

    The only memory that grows with the tokens: 1 (gated 2) tensors (T, N), with duals 3 (gated 5).
    """

    z_TN: Tensor
    s_TN: Tensor | None
    dual_p_TN: Tensor | None
    dual_z_TN: Tensor | None
    dual_s_TN: Tensor | None

    @classmethod
    def at(cls, tokens: MlpTokens, weights: MlpWeights, options: MlpOptions) -> _Latents:
        """Create the latents z = W1 X + b1 and s = Wg X + bg, with duals zero."""
        shape = (len(tokens.x_TD), len(weights.up.weight_OI))
        gated = weights.gate is not None
        latents = cls(
            z_TN=tokens.x_TD.new_empty(shape),
            s_TN=tokens.x_TD.new_empty(shape) if gated else None,
            dual_p_TN=tokens.x_TD.new_zeros(shape) if options.duals else None,
            dual_z_TN=tokens.x_TD.new_zeros(shape) if options.duals else None,
            dual_s_TN=tokens.x_TD.new_zeros(shape) if options.duals and gated else None,
        )
        for rows in tokens.chunks(options.chunk_tokens):
            latents.z_TN[rows] = weights.up(tokens.x_TD[rows])
            if weights.gate is not None and latents.s_TN is not None:
                latents.s_TN[rows] = weights.gate(tokens.x_TD[rows])
        return latents


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    weights: MlpWeights
    """Weights that the objective is stated for."""
    refitted: MlpWeights
    """After (a): those of the next sweep."""
    objective: float
    damping: float
    damping_raises: int


class _Moments:
    """R = sum_t e [x 1]^T of one affine map, and on demand the Gram of [x 1]: sums in float64."""

    def __init__(self, affine: Affine, *, with_gram: bool) -> None:
        num_outputs, num_inputs = affine.weight_OI.shape
        order = num_inputs + (affine.bias_O is not None)
        self.affine = affine
        self.residual_OA = affine.weight_OI.new_zeros(num_outputs, order, dtype=torch.float64)
        self.gram_AA = affine.weight_OI.new_zeros(order, order, dtype=torch.float64) if with_gram else None

    def add(self, x_TI: Tensor, residual_TO: Tensor) -> None:
        x_TA = self.affine.with_ones(x_TI)
        self.residual_OA += residual_TO.T @ x_TA
        if self.gram_AA is not None:
            self.gram_AA += x_TA.T @ x_TA

    def add_up(self, tokens: MlpTokens) -> None:
        tokens.add_up(self.residual_OA)
        if self.gram_AA is not None:
            tokens.add_up(self.gram_AA)

    def refit(self, factor: DampedCholesky) -> Affine:
        return update_affine(self.affine, self.residual_OA, factor)

    def factor(self, damping: float, where: str) -> DampedCholesky:
        assert self.gram_AA is not None
        return damped_cholesky(self.gram_AA, damping, where)


def _start(
    tokens: MlpTokens, weights: MlpWeights, latents: _Latents, options: MlpOptions, x_factor: DampedCholesky
) -> tuple[_State, float]:
    """Return the consistent start, where J is beta times the block's error, and how much of J is round-off."""
    penalties = options.penalties
    error, size = zero_sum(tokens), zero_sum(tokens)
    for rows in tokens.chunks(options.chunk_tokens):
        z_TN, s_TN = latents.z_TN[rows], None if latents.s_TN is None else latents.s_TN[rows]
        link_TN = weights.link(z_TN, s_TN)
        error += energy(tokens.y_TD[rows] - weights.down(link_TN))
        size += penalties.beta * energy(tokens.y_TD[rows]) + penalties.gamma * energy(link_TN)
        size += penalties.alpha * (energy(z_TN) + (0.0 if s_TN is None else energy(s_TN)))
    error, size = tokens.add_up(error), tokens.add_up(size)
    state = _State(
        weights=weights,
        refitted=weights,
        objective=penalties.beta * float(error),
        damping=x_factor.damping,
        damping_raises=x_factor.num_raises,
    )
    return state, tokens.x_TD.shape[1] * torch.finfo(tokens.x_TD.dtype).eps ** 2 * float(size)


def _sweep(
    tokens: MlpTokens, state: _State, latents: _Latents, options: MlpOptions, x_factor: DampedCholesky
) -> _State:
    """Make one pass over the tokens: (c), (d), (e), duals and the moments of (a); then (a)."""
    penalties, weights = options.penalties, state.refitted
    up, gate, down = weights.up, weights.gate, weights.down
    correction_DN = p_correction(down, penalties)
    up_moments = _Moments(up, with_gram=False)
    gate_moments = None if gate is None else _Moments(gate, with_gram=False)
    down_moments = _Moments(down, with_gram=True)
    objective = zero_sum(tokens)
    for rows in tokens.chunks(options.chunk_tokens):
        x_TD, y_TD, z_TN = tokens.x_TD[rows], tokens.y_TD[rows], latents.z_TN[rows]
        s_TN = None if latents.s_TN is None else latents.s_TN[rows]
        dual_p, dual_z, dual_s = (
            x_TD.new_zeros(()) if dual is None else dual[rows]
            for dual in (latents.dual_p_TN, latents.dual_z_TN, latents.dual_s_TN)
        )
        up_TN = up(x_TD)
        gate_TN = None if gate is None else gate(x_TD)

        p_TN = update_p(weights.link(z_TN, s_TN) - dual_p, y_TD, down, correction_DN)
        z_TN, s_TN = _update_latents(
            weights.activation,
            z_TN,
            s_TN,
            up_TN - dual_z,
            None if gate_TN is None else gate_TN - dual_s,
            p_TN + dual_p,
            options,
        )
        latents.z_TN[rows] = z_TN

        link_gap_TN = p_TN - weights.link(z_TN, s_TN)
        up_gap_TN = z_TN - up_TN
        error_TD = y_TD - down(p_TN)
        if options.duals:
            objective += penalties.beta * energy(y_TD - down(weights.link(up_TN, gate_TN)))
            dual_p += link_gap_TN  # views: the latents' own rows
            dual_z += up_gap_TN
        else:
            objective += penalties.beta * energy(error_TD) + penalties.gamma * energy(link_gap_TN)
            objective += penalties.alpha * energy(up_gap_TN)
        up_moments.add(x_TD, up_gap_TN + dual_z)
        down_moments.add(p_TN, error_TD)
        if latents.s_TN is not None and gate_moments is not None and s_TN is not None and gate_TN is not None:
            latents.s_TN[rows] = s_TN
            gate_gap_TN = s_TN - gate_TN
            if options.duals:
                dual_s += gate_gap_TN
            else:
                objective += penalties.alpha * energy(gate_gap_TN)
            gate_moments.add(x_TD, gate_gap_TN + dual_s)

    for moments in (up_moments, gate_moments, down_moments):
        if moments is not None:
            moments.add_up(tokens)
    objective = tokens.add_up(objective)
    down_factor = down_moments.factor(options.damping, "refit of the consumer on p")
    return _State(
        weights=weights,
        refitted=replace(
            weights,
            up=up_moments.refit(x_factor),
            gate=None if gate_moments is None else gate_moments.refit(x_factor),
            down=down_moments.refit(down_factor),
        ),
        objective=float(objective),
        damping=max(state.damping, down_factor.damping),
        damping_raises=state.damping_raises + down_factor.num_raises,
    )


def _update_latents(
    activation: Activation,
    z_TN: Tensor,
    s_TN: Tensor | None,
    z_center_TN: Tensor,
    s_center_TN: Tensor | None,
    target_TN: Tensor,
    options: MlpOptions,
) -> tuple[Tensor, Tensor | None]:
    """Update the latents by (d) and (e): exactly where there is a formula, else by Gauss-Newton."""
    penalties = options.penalties
    if s_TN is None or s_center_TN is None:
        if activation.exact_z is not None:
            return activation.exact_z(z_center_TN, target_TN, penalties), None
        one_TN = z_TN.new_ones(()).expand_as(z_TN)
        for _ in range(options.inner_steps):
            z_TN = gauss_newton(activation, z_TN, z_center_TN, target_TN, one_TN, penalties)
        return z_TN, None
    z_TN = gated_z(activation.value(s_TN), z_center_TN, target_TN, penalties)
    for _ in range(options.inner_steps):
        s_TN = gauss_newton(activation, s_TN, s_center_TN, target_TN, z_TN, penalties)
    return z_TN, s_TN


def _input_factor(tokens: MlpTokens, up: Affine, options: MlpOptions) -> DampedCholesky:
    """Factor the Gram of the block's inputs, once because it never changes."""
    order = up.weight_OI.shape[1] + (up.bias_O is not None)
    gram_AA = up.weight_OI.new_zeros(order, order, dtype=torch.float64)
    for rows in tokens.chunks(options.chunk_tokens):
        x_TA = up.with_ones(tokens.x_TD[rows])
        gram_AA += (x_TA.T @ x_TA).to(torch.float64)
    return damped_cholesky(tokens.add_up(gram_AA), options.damping, "refit of the producers on z")


def _refit_down(tokens: MlpTokens, weights: MlpWeights, options: MlpOptions) -> tuple[Affine, DampedCholesky]:
    """Refit the consumer (f): by ridge regression on the real activations, toward `weights.down`."""
    moments = _Moments(weights.down, with_gram=True)
    for rows in tokens.chunks(options.chunk_tokens):
        hidden_TN = weights.hidden(tokens.x_TD[rows])
        moments.add(hidden_TN, tokens.y_TD[rows] - weights.down(hidden_TN))
    moments.add_up(tokens)
    factor = moments.factor(options.damping, "refit of the consumer on its real inputs")
    return moments.refit(factor), factor


ADMM = Solver(
    solve=judged_least_squares,
    propose=solve_mlp,
    reads={"gram", "tokens"},
    changes={"consumer", "producers"},
    num_latents=2,
)
ADMM_DUALS = replace(ADMM, propose=solve_mlp_with_duals, num_latents=5)
