"""Scores from the weights alone. Shape suffixes: U units, O outputs, I inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from structprune.scores.score import Score
from structprune.types import LayerProblem


def magnitude(problem: LayerProblem) -> Tensor:
    """Return the product over the group's matrices of the L2 norm of each unit's slice, shape (U,).

    The product is unchanged when a channel's scale moves between the producers and the consumer of a linear unit.
    """
    weight_OI = problem.weight_OI.float()
    consumer_norm_U = weight_OI.T.reshape(problem.num_units, -1).norm(dim=1)
    return problem.producer_norm_U * consumer_norm_U


def random(problem: LayerProblem) -> Tensor:
    """Draw uniform scores in [0, 1), shape (U,), from the problem's seed: the baseline that any score must beat."""
    # On the host, so that the draw is the same whatever device the problem lies on.
    generator = torch.Generator().manual_seed(problem.seed)
    return torch.rand(problem.num_units, generator=generator, dtype=torch.float64).to(problem.device)


MAGNITUDE = Score(score=magnitude, reads=set())
RANDOM = Score(score=random, reads=set())
