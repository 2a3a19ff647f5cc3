"""Scores from weights and activation statistics. Shape suffixes: U units, O outputs, I inputs."""

from __future__ import annotations

from torch import Tensor

from structprune.types import LayerProblem


def wanda(problem: LayerProblem) -> Tensor:
    """Wanda column score sum_i |W_ij| * |X_j|_2 summed over the unit's inputs, shape (U,).

    Wanda (arXiv 2306.11695, Eq. 1) summed over output rows, as FASP (arXiv 2501.09412) does; |X_j|_2 is the square
    root of the Gram's diagonal, divided by the number of tokens.
    """
    norm_I = (problem.gram_II.diagonal() / problem.num_tokens).sqrt()
    score_I = problem.weight_OI.to(norm_I.dtype).abs().sum(dim=0) * norm_I
    return score_I.reshape(problem.num_units, problem.width).sum(dim=1)
