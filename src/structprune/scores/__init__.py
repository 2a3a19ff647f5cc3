"""Scores: from one block's problem to one number per removable unit; the units with the lowest go first.

Selectors choose the kept set as a whole. Read first: `score.py`, `activations.py`; then `selection.py`, greedy removal.
"""

from structprune.registry import Registry
from structprune.scores.score import Score, Selector

_SCORES = {
    "magnitude": "structprune.scores.weights:MAGNITUDE",
    "group-norm": "structprune.scores.weights:GROUP_NORM",
    "random": "structprune.scores.weights:RANDOM",
    "wanda": "structprune.scores.activations:WANDA",
    "fluctuation": "structprune.scores.activations:FLUCTUATION",
    "l2": "structprune.scores.activations:L2",
    "obs": "structprune.scores.activations:OBS",
    "loss": "structprune.scores.activations:LOSS",
    "taylor-vector": "structprune.scores.taylor:VECTOR",
    "taylor-first": "structprune.scores.taylor:FIRST",
    "taylor-second": "structprune.scores.taylor:SECOND",
    "taylor-mix": "structprune.scores.taylor:MIX",
}
_SELECTORS = {
    "greedy": "structprune.scores.selection:GREEDY",
    "penalty": "structprune.scores.penalty:PENALTY",
    "greedy-swap": "structprune.scores.selection:GREEDY_SWAP",
}
# Both are values of `--score`.
SCORES: Registry[Score] = Registry("score", Score, _SCORES, group="structprune.scores", reserved=_SELECTORS)
SELECTORS: Registry[Selector] = Registry(
    "selector", Selector, _SELECTORS, group="structprune.selectors", reserved=_SCORES
)


def score_or_selector(name: str) -> Score | Selector:
    """Get the entry of this name. Raises InputError that lists both kinds for an unknown one."""
    SCORES.check(name, SELECTORS)
    return SCORES.find(name) or SELECTORS.get(name)
