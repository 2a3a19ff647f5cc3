"""Scores: from one block's problem to one number per removable unit; the units with the lowest go first.

Selectors choose the kept set as a whole. Read first: `activations.py`; then `selection.py`, greedy removal.
"""

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
        "taylor-vector": "structprune.scores.taylor:vector",
        "taylor-first": "structprune.scores.taylor:first",
        "taylor-second": "structprune.scores.taylor:second",
        "taylor-mix": "structprune.scores.taylor:mix",
    },
)
TAYLOR = ("taylor-vector", "taylor-first", "taylor-second", "taylor-mix")
"""Those that read gradients by the weights, and nothing else."""

Selector = Callable[[LayerProblem, int], Tensor]

SELECTORS: Registry[Selector] = Registry(
    "selector",
    {
        "greedy": "structprune.scores.selection:keep_greedy",
        "penalty": "structprune.scores.penalty:keep_penalty",
        "greedy-swap": "structprune.scores.selection:keep_swapped",
    },
)
WORKSPACE = {
    "fluctuation": (0, 2),
    "obs": (1, 2),
    "loss": (1, 3),
    "greedy": (1, 2),
    "greedy-swap": (4, 3),
    "penalty": (2, 4),
}
"""Of a score or selector, what it holds at most in float64: matrices of the Gram's size, and of the consumer's.

Those that are not here hold two copies of the consumer in float32.
"""
