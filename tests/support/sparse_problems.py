"""Random problems of one linear map: correlated inputs of different energies, two of them far above the others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from structprune.patterns import NM, Pattern, Unstructured
from structprune.solvers.elements.problem import SparseProblem, SparseSolution
from structprune.solvers.elements.unit import unit_problem
from structprune.types import Moments

HALF = Unstructured(share=0.5, scope="layer")
MANY = Unstructured(share=0.7, scope="layer")
TWO_OF_FOUR, FOUR_OF_EIGHT = NM(keep=2, of=4), NM(keep=4, of=8)


def sums(x_IT: Tensor) -> Moments:
    return Moments(gram_II=x_IT @ x_IT.T, num_tokens=x_IT.shape[1], sum_I=x_IT.sum(dim=1))


def inputs(seed: int, num_inputs: int = 96, num_tokens: int = 960, factors: int = 24) -> Tensor:
    """Gaussian factors and as much noise, log-normal energies of the channels, two outliers: (I, 2 T), float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x_IT = normal(num_inputs, factors) @ normal(factors, 2 * num_tokens) / math.sqrt(factors)
    scale_I = torch.exp(0.5 * normal(num_inputs))
    scale_I[torch.randperm(num_inputs, generator=generator)[:2]] *= 10
    return (x_IT + normal(num_inputs, 2 * num_tokens)) * scale_I[:, None]


def sparse_problem(pattern: Pattern, seed: int = 0, **changes: Any) -> SparseProblem:
    """A problem of 48 outputs and 96 inputs."""
    x_IT = inputs(seed)
    half = x_IT.shape[1] // 2
    weight_OI = torch.randn(48, len(x_IT), generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64)
    fields: dict[str, Any] = {
        "weight_OI": weight_OI,
        "pattern": pattern,
        "moments": sums(x_IT[:, :half]),
        "damping": 1e-2,
        "energy_NI": (x_IT[:, :half] ** 2).reshape(len(x_IT), 4, -1).mean(dim=2).T.float(),
    }
    return SparseProblem(**{**fields, **changes})


def damped_error(problem: SparseProblem, solution: SparseSolution) -> float:
    """tr((V - W) H (V - W)^T) with the ridge in H: what the solvers minimise."""
    unit = unit_problem(problem)
    difference_OI = (solution.weight_OI - problem.weight_OI) * unit.scale_I
    return float(((difference_OI @ unit.gram_II) * difference_OI).sum())
