"""Scores: one block's problem -> one number per removable unit; the lowest go first."""

from collections.abc import Callable

from torch import Tensor

from structprune.registry import Registry
from structprune.types import LayerProblem

Score = Callable[[LayerProblem], Tensor]

SCORES: Registry[Score] = Registry(
    "score",
    {
        "magnitude": "structprune.scores.weights:magnitude",
        "wanda": "structprune.scores.activations:wanda",
    },
)
