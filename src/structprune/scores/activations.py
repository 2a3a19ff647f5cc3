"""Scores from weights and activation statistics. Shape suffixes: U units, O outputs, I inputs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from structprune.linalg.cholesky import damped_cholesky, inverted
from structprune.linalg.gram_products import in_float64
from structprune.linalg.obs import group_costs, metric_root
from structprune.scores.score import Score, Workspace
from structprune.types import LayerProblem


def wanda(problem: LayerProblem) -> Tensor:
    """Return Wanda's column scores sum_i |W_ij| * |X_j|_2, summed over each unit's inputs, shape (U,).

    Wanda (arXiv 2306.11695, Eq. 1) summed over output rows, as FASP (arXiv 2501.09412) does; |X_j|_2 is the square root
    of the Gram's diagonal, divided by the number of tokens.
    """
    total = problem.total()
    norm_I = (total.gram_II.diagonal() / total.num_tokens).sqrt()
    score_I = problem.weight_OI.to(norm_I.dtype).abs().sum(dim=0) * norm_I
    return score_I.reshape(problem.num_units, problem.width).sum(dim=1)


def l2(problem: LayerProblem) -> Tensor:
    """Return |W_:j|^2 G_jj / tokens, the squared output error of dropping input j alone, summed over each unit."""
    total = problem.total()
    gram_I = total.gram_II.diagonal() / total.num_tokens
    score_I = problem.weight_OI.to(gram_I.dtype).square().sum(dim=0) * gram_I
    return score_I.reshape(problem.num_units, problem.width).sum(dim=1)


def fluctuation(problem: LayerProblem) -> Tensor:
    """Return Var(x_j) sum_i W_ij^2 of the inputs, averaged over each unit's inputs, shape (U,).

    FLAP (arXiv 2312.11983), as its public code has it: what a mean cannot stand in for. The variance is E[x^2] - E[x]^2
    from float32 squares and float64 sums, cut at zero.
    """
    total = problem.total()
    assert total.sum_I is not None
    mean_I = total.sum_I / total.num_tokens
    variance_I = (total.gram_II.diagonal().to(torch.float64) / total.num_tokens - mean_I.square()).clamp_min(0)
    score_I = variance_I * problem.weight_OI.to(torch.float64).square().sum(dim=0)
    return score_I.reshape(problem.num_units, problem.width).mean(dim=1)


def obs(problem: LayerProblem) -> Tensor:
    """Return half the squared output error of dropping each unit g after the refit, shape (U,).

    1/2 tr(W_g ([H^-1]_gg)^-1 W_g^T) / tokens with H = G + delta I (optimal brain surgeon, Hassibi & Stork 1993; group
    form).
    """
    return _exact_cost(problem, problem.weight_OI.to(torch.float64))


def loss(problem: LayerProblem) -> Tensor:
    """Return the second-order increase of the loss when each unit g is dropped, shape (U,).

    1/2 tr(F W_g ([H^-1]_gg)^-1 W_g^T) / tokens, F the output sensitivity. Derived (docs/methods/structprune.md). Raises
    ValueError if the sensitivity was not measured.
    """
    if problem.sensitivity_OO is None:
        raise ValueError("score 'loss' needs the output sensitivity")
    return _exact_cost(problem, metric_root(problem.sensitivity_OO).T @ problem.weight_OI.to(torch.float64))


def _exact_cost(problem: LayerProblem, weight_MI: Tensor) -> Tensor:
    total = problem.total()
    inverse_II = inverted(damped_cholesky(partial(in_float64, total.gram_II), problem.damping, "OBS score").factor_NN)
    return group_costs(weight_MI, inverse_II, problem.width) / total.num_tokens


WANDA = Score(score=wanda, reads={"gram"})
L2 = Score(score=l2, reads={"gram"})
FLUCTUATION = Score(score=fluctuation, reads={"gram", "sums"}, workspace=Workspace(consumers=2))
OBS = Score(score=obs, reads={"gram"}, workspace=Workspace(grams=1, consumers=2))
LOSS = Score(score=loss, reads={"gram", "sensitivity"}, workspace=Workspace(grams=1, consumers=3))
