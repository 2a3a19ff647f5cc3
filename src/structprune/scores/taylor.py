"""Taylor scores: what the loss would change by, to first or second order, if a unit's weights were zero.

After LLM-Pruner (arXiv 2305.11627); what was read where is in docs/methods/llm-pruner.md. The sums come from one
streamed backward pass (`engine/sensitivity/taylor.py`). Shape suffix: U units.
"""

from __future__ import annotations

from torch import Tensor

from structprune.scores.score import Score
from structprune.types import LayerProblem, TaylorSums


def vector(problem: LayerProblem) -> Tensor:
    """Return |sum w g|, shape (U,): the first-order loss change of removing the whole unit; terms may cancel."""
    return _sums(problem).signed_U.abs()


def first(problem: LayerProblem) -> Tensor:
    """Return sum |w g|, shape (U,): the first-order change of the loss, weight by weight."""
    return _sums(problem).first_U


def second(problem: LayerProblem) -> Tensor:
    """Return sum w^2 g2, shape (U,): the second order, weight by weight; g2 stands in for the Hessian's diagonal."""
    return _sums(problem).second_U


def mix(problem: LayerProblem) -> Tensor:
    """Return sum |w g - 1/2 w^2 g2|, shape (U,): both orders, subtracted weight by weight before the absolute value."""
    return _sums(problem).mixed_U


def _sums(problem: LayerProblem) -> TaylorSums:
    if problem.taylor is None:
        raise ValueError("Taylor scores need gradients by the weights")
    return problem.taylor


VECTOR = Score(score=vector, reads={"gradients"})
FIRST = Score(score=first, reads={"gradients"})
SECOND = Score(score=second, reads={"gradients"})
MIX = Score(score=mix, reads={"gradients"})
