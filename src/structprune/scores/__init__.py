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
        "random": "structprune.scores.weights:random",
        "wanda": "structprune.scores.activations:wanda",
        "fluctuation": "structprune.scores.activations:fluctuation",
        "l2": "structprune.scores.activations:l2",
        "obs": "structprune.scores.activations:obs",
        "loss": "structprune.scores.activations:loss",
    },
)

Selector = Callable[[LayerProblem, int], Tensor]

SELECTORS: Registry[Selector] = Registry(
    "selector",
    {
        "greedy": "structprune.scores.selection:keep_greedy",
        "penalty": "structprune.scores.penalty:keep_penalty",
        "greedy-swap": "structprune.scores.selection:keep_swapped",
    },
)
