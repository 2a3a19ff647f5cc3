"""One MLP block as values: its tokens, its weights, its true error, what a solver returns.

Shape suffixes: T tokens, D hidden, N kept channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.linalg.gram_products import energy
from structprune.solvers.mlp.iterate import IterateStatus
from structprune.solvers.mlp.updates import Activation, Affine

CHUNK_TOKENS = 512
"""Tokens in one step of an iterative solver: two dozen temporaries as wide as the MLP are alive at once."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpTokens:
    """Inputs of the MLP (after the norm) and the outputs it should give, one row per token.

    Some of the tokens, where several processes solve together: all that one solver needs of the others' are sums.
    """

    x_TD: Tensor
    y_TD: Tensor
    add_up: Callable[[Tensor], Tensor] = _same
    """The sum over all that hold tokens, in place, the same bits for each; all ask for the same sums in one order."""
    num_holders: int = 1

    def __post_init__(self) -> None:
        assert len(self.x_TD) == len(self.y_TD)
        assert len(self.x_TD) > 0 or self.num_holders > 1
        assert self.x_TD.dtype == self.y_TD.dtype
        assert self.x_TD.dtype in (torch.float32, torch.float64)

    def chunks(self, chunk_tokens: int) -> Iterator[slice]:
        """Yield the rows of one micro-batch after the other."""
        for start in range(0, len(self.x_TD), chunk_tokens):
            yield slice(start, start + chunk_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """down(phi(up x)), or down(phi(gate x) * up x) if there is a gate; of the tokens' dtype."""

    activation: Activation
    up: Affine
    down: Affine
    gate: Affine | None = None

    def __post_init__(self) -> None:
        # up and gate share one Gram of their inputs.
        assert self.gate is None or (self.gate.bias_O is None) == (self.up.bias_O is None)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """Compute the consumer's real inputs, (T, N)."""
        up_TN = self.up(x_TD)
        return self.link(up_TN, None if self.gate is None else self.gate(x_TD))

    def link(self, z_TN: Tensor, s_TN: Tensor | None) -> Tensor:
        """Compute phi(z), or phi(s) * z for a gated MLP."""
        return self.activation.value(z_TN) if s_TN is None else self.activation.value(s_TN) * z_TN


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSolution:
    """New weights of an iterative solver.

    `history` is its objective before the first step and after each. `statistics`: iterations; block_error_start and
    block_error, sum_t |y - MLP(x)|^2 on the tokens that were solved for.
    """

    weights: MlpWeights
    history: list[float]
    status: IterateStatus
    statistics: Mapping[str, float]


@torch.no_grad()
def block_error(tokens: MlpTokens, weights: MlpWeights, chunk_tokens: int = CHUNK_TOKENS) -> float:
    """Compute sum_t |y - MLP(x)|^2 on the real activations."""
    total = zero_sum(tokens)
    for rows in tokens.chunks(chunk_tokens):
        total += energy(tokens.y_TD[rows] - weights.down(weights.hidden(tokens.x_TD[rows])))
    return float(tokens.add_up(total))


def zero_sum(tokens: MlpTokens) -> Tensor:
    """Create a float64 zero on the tokens' device, for a sum that is read once per pass."""
    return torch.zeros((), dtype=torch.float64, device=tokens.x_TD.device)
