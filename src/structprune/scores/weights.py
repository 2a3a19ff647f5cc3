"""Scores from the weights alone. Shape suffixes: M producers, U units, O outputs, I inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from structprune.scores.score import Score
from structprune.types import LayerProblem


def magnitude(problem: LayerProblem) -> Tensor:
    """Return the product over the group's matrices of the L2 norm of each unit's slice, shape (U,).

    The product is unchanged when a channel's scale moves between the producers and the consumer of a linear unit.
    """
    return problem.producer_norms_MU.prod(dim=0) * _consumer_norms(problem)


def group_norm(problem: LayerProblem) -> Tensor:
    """Return the mean over the group's matrices of the squared L2 norm of each unit's slice, shape (U,).

    DepGraph (arXiv 2301.12900, section 3.4) sums over the group; a mean ranks alike.
    """
    norms_MU = torch.cat([problem.producer_norms_MU, _consumer_norms(problem)[None]])
    return norms_MU.square().mean(dim=0)


def _consumer_norms(problem: LayerProblem) -> Tensor:
    return problem.weight_OI.float().T.reshape(problem.num_units, -1).norm(dim=1)


def random(problem: LayerProblem) -> Tensor:
    """Draw uniform scores in [0, 1), shape (U,), from the problem's seed: the baseline that any score must beat."""
    # On the host, so that the draw is the same whatever device the problem lies on.
    generator = torch.Generator().manual_seed(problem.seed)
    return torch.rand(problem.num_units, generator=generator, dtype=torch.float64).to(problem.device)


MAGNITUDE = Score(score=magnitude, reads=set())
GROUP_NORM = Score(score=group_norm, reads=set())
RANDOM = Score(score=random, reads=set())
