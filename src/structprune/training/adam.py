"""AdamW on one flat float32 vector whose moments are kept by the caller, and the learning rate's course.

Shape suffix: P parameters of a block, one after the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from structprune.errors import NumericalError

BETAS = (0.9, 0.95)
EPSILON = 1e-8


def adam_step(state_3P: Tensor, gradient_P: Tensor, *, rate: float, number: int) -> None:
    """Step `number` (from 1) of AdamW without weight decay, in place.

    The rows of `state_3P` are the weights and their first and second moments.
    """
    weights_P = state_3P[0].requires_grad_(True)
    optimiser = torch.optim.AdamW([weights_P], lr=rate, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True)
    optimiser.state[weights_P] = {
        "step": torch.tensor(float(number - 1), device=weights_P.device),
        "exp_avg": state_3P[1],
        "exp_avg_sq": state_3P[2],
    }
    weights_P.grad = gradient_P
    optimiser.step()
    weights_P.requires_grad_(False)


def course(step: int, warmup: int, progress: float) -> float:
    """Share of the learning rate at step `step` (from 0): a linear rise, and a cosine from 1 to 0 over `progress`."""
    rise = min(1.0, (step + 1) / (warmup + 1)) if warmup else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def check_gradient(gradient_P: Tensor, where: str) -> None:
    """Raise NumericalError if the gradient is not finite."""
    # Extremes carry NaN and infinity along, without a temporary of the vector's size.
    if len(gradient_P) and not all(torch.isfinite(extreme) for extreme in gradient_P.aminmax()):
        raise NumericalError(
            "a gradient is NaN or infinite",
            where=where,
            do="use --dtype float32, or lower --learning-rate",
        )
