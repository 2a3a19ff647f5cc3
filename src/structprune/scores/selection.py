"""Which units stay: the best by a score, or what greedy removal with exact updates leaves, exchanges after it or not.

Shape suffixes: U units, O outputs, I inputs, M metric outputs, P partitions.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from structprune.linalg.cholesky import damped_cholesky, inverted, solved
from structprune.linalg.gram_products import add_columns, energy, in_float64, output_energy, times_gram
from structprune.linalg.obs import RemovalPath, greedy_removal, metric_root, set_objective, swap_units
from structprune.rows import Rows
from structprune.scores.score import Selector, Workspace
from structprune.types import LayerProblem

# Units that leave together in greedy removal, as a share of all: 128 steps for the whole width.
_STEP_SHARE = 128


def keep_best(score_U: Tensor, num_keep: int, partitions: int = 1) -> Tensor:
    """Mask of the `num_keep` highest scores, as many in each partition, shape (U,); ties keep the lower number."""
    assert num_keep % partitions == 0
    order_PU = torch.sort(score_U.reshape(partitions, -1), dim=1, descending=True, stable=True).indices
    keep_PU = torch.zeros_like(order_PU, dtype=torch.bool)
    return keep_PU.scatter_(1, order_PU[:, : num_keep // partitions], True).flatten()


def ascending(score_U: Tensor, partitions: int = 1) -> Tensor:
    """Sort the scores in the order of removal, shape (U,): the lowest of every partition, then the next of each."""
    return score_U.reshape(partitions, -1).sort(dim=1).values.T.flatten()


def removal_order(score_U: Tensor, partitions: int = 1) -> Tensor:
    """List the units in the order of removal, (U,): the lowest of every partition, then the next of each.

    Ties keep the lower number, as `keep_best` does.
    """
    order_PU = torch.sort(score_U.reshape(partitions, -1).flip(1), dim=1, stable=True).indices
    size = order_PU.shape[1]
    firsts_P1 = torch.arange(partitions, device=score_U.device)[:, None] * size
    return (firsts_P1 + size - 1 - order_PU).T.flatten()


def removal_path(problem: LayerProblem, num_remove: int) -> RemovalPath:
    """Order of removal by greedy OBS and what each removal adds, per token.

    With a sensitivity F the cost is the second-order increase of the summed loss per token, 1/2 tr(F D H D^T); without
    it, half the squared output error per token. The start is the ridge solution on all inputs, so the dense-path
    target is followed from the first removal on. The metric changes which units leave; it does not change the
    least-squares weight of those that stay, because every output row is free.

    The ridge is a share of each input's own energy. As a share of the mean, one unit with the energy of thousands makes
    all others dear: one MLP of SmolLM2 was priced 11 times too high by it.
    """
    weight_MI, inverse_II, _ = _objective(problem, own=True)
    path = _greedy_path(problem, num_remove, weight_MI, inverse_II)
    return RemovalPath(order=path.order, cost=path.cost / problem.total().num_tokens)


def keep_greedy(problem: LayerProblem, num_keep: int) -> Tensor:
    """Mask of the units that greedy removal leaves, shape (U,)."""
    keep_U = torch.ones(problem.num_units, dtype=torch.bool, device=problem.device)
    keep_U[removal_path(problem, problem.num_units - num_keep).order] = False
    return keep_U


def keep_swapped(problem: LayerProblem, num_keep: int) -> Tensor:
    """Mask of the units that are left after greedy removal and exchanges that lower its objective, shape (U,).

    Of one partition only: exchanges do not keep as many in each.
    """
    assert problem.partitions == 1
    weight_MI, inverse_II, delta = _objective(problem, own=False)
    keep_U = torch.ones(problem.num_units, dtype=torch.bool, device=problem.device)
    keep_U[_greedy_path(problem, problem.num_units - num_keep, weight_MI.clone(), inverse_II).order] = False
    # The exchanges hold two matrices of this size; the inverse would be a third.
    del inverse_II
    gram_II = shrunk_gram(problem)
    gram_II.diagonal().add_(delta)
    return swap_units(weight_MI, gram_II, keep_U, width=problem.width).keep_U


def decision_objective(problem: LayerProblem, keep_U: Tensor) -> float:
    """Return the mixed-integer objective of keeping these units, as a share of sum |W x|^2: what no refit can repair.

    min over V, removed columns zero, of sum |V x - W x|^2, up to the ridge of the decision.
    """
    gram_II = problem.total().gram_II
    delta = problem.damping * (float(gram_II.diagonal().mean(dtype=torch.float64)) or 1.0)
    ridge = delta * float(energy(problem.weight_OI))
    whole = 0.5 * (output_energy(problem.weight_OI, gram_II) + ridge)
    if whole <= 0:
        return 0.0
    return set_objective(problem.weight_OI, gram_II, delta, keep_U, problem.width) / whole


def shrunk_gram(problem: LayerProblem) -> Tensor:
    """Return the shrunk Gram (1 - a) G + a blockdiag(G), (I, I) in float64, a new tensor.

    a is the problem's shrinkage; blockdiag(G) has one block per unit. A removal may rely on the remaining units only as
    far as their activations move together, and how they do differs between texts far more than how large they are.
    Shrinkage of a covariance toward its diagonal is Ledoit and Wolf's (2004); here the share is a setting and not
    estimated, because the calibration text alone cannot tell it.
    """
    gram_II = in_float64(problem.total().gram_II)
    if problem.shrinkage > 0:
        by_unit = (problem.num_units, problem.width, problem.num_units, problem.width)
        own = gram_II.view(by_unit).diagonal(dim1=0, dim2=2).clone()
        gram_II.mul_(1 - problem.shrinkage)
        gram_II.view(by_unit).diagonal(dim1=0, dim2=2).copy_(own)
    return gram_II


def _objective(problem: LayerProblem, *, own: bool) -> tuple[Tensor, Tensor, float]:
    """Return W and H^-1 of 1/2 tr((V - W) H (V - W)^T), and the ridge in H, all in float64.

    H is the shrunk Gram, damped by a share of each input's `own` energy or of the mean. W is the ridge solution on all
    inputs, times the root of the damped sensitivity where there is one.
    """
    target_OI = problem.total().target_OI
    weight_OI = (
        problem.weight_OI.to(torch.float64, copy=True) if target_OI is None else _refitted(problem, target_OI, own)
    )
    if problem.sensitivity_OO is not None:
        weight_OI = metric_root(problem.sensitivity_OO).T @ weight_OI
    factor = damped_cholesky(lambda: shrunk_gram(problem), problem.damping, "greedy removal", own=own)
    return weight_OI, inverted(factor.factor_NN), factor.delta


def _refitted(problem: LayerProblem, target_OI: Rows, own: bool) -> Tensor:
    """Return the ridge solution on all inputs, (O, I) in float64.

    What the weights should be without a removal is a matter of fitting: there the correlations count in full.
    """
    gram_II = problem.total().gram_II
    # Nothing of the weight in float64 is left when the Gram is factored.
    residual_OI = times_gram(problem.weight_OI, gram_II, None, None).neg_()
    add_columns(residual_OI, target_OI, None)
    factor = damped_cholesky(partial(in_float64, gram_II), problem.damping, "greedy removal", own=own)
    return solved(factor.factor_NN, residual_OI).add_(problem.weight_OI)


def _greedy_path(problem: LayerProblem, num_remove: int, weight_MI: Tensor, inverse_II: Tensor) -> RemovalPath:
    """Remove `num_remove` units greedily with the problem's partitions; weight and inverse are overwritten."""
    step = max(1, problem.num_units // _STEP_SHARE)
    return greedy_removal(
        weight_MI,
        inverse_II,
        num_remove,
        width=problem.width,
        units_per_step=step,
        partitions=problem.partitions,
    )


GREEDY = Selector(keep=keep_greedy, reads={"gram"}, workspace=Workspace(grams=1, consumers=2))
GREEDY_SWAP = Selector(
    keep=keep_swapped, reads={"gram"}, workspace=Workspace(grams=4, consumers=3), keeps_partitions=False
)
