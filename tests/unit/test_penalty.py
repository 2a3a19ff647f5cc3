"""The penalty method's mask: as many units as asked, better than one ranking, near the best set.

Shape suffixes: C candidate sets, O outputs, I inputs, K kept inputs, U units.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from structprune.scores import SCORES, SELECTORS
from structprune.scores.selection import keep_best
from structprune.types import LayerProblem, Moments


def problem(seed: int, num_units: int = 10, width: int = 1) -> LayerProblem:
    generator = torch.Generator().manual_seed(seed)
    num_inputs = num_units * width
    mix_II = torch.randn(num_inputs, num_inputs, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(200, num_inputs, generator=generator, dtype=torch.float64) @ mix_II
    return LayerProblem(
        weight_OI=torch.randn(6, num_inputs, generator=generator, dtype=torch.float64),
        fit=Moments(gram_II=x_TI.T @ x_TI, num_tokens=200),
        width=width,
        damping=1e-6,
        producer_norms_MU=torch.ones(1, num_units),
    )


def refit_errors(layer: LayerProblem, kept_CK: Tensor) -> Tensor:
    """min over V of |V x_K - W x|^2 for each set of kept inputs, by the normal equations."""
    gram_CKK = layer.fit.gram_II[kept_CK[:, :, None], kept_CK[:, None, :]]
    cross_COK = (layer.weight_OI @ layer.fit.gram_II)[:, kept_CK].transpose(0, 1)
    value_COK = torch.linalg.solve(gram_CKK, cross_COK.mT).mT
    difference_COI = -layer.weight_OI.expand(len(kept_CK), -1, -1).clone()
    difference_COI.scatter_add_(2, kept_CK[:, None, :].expand_as(value_COK), value_COK)
    return (difference_COI @ layer.fit.gram_II * difference_COI).sum(dim=(1, 2))


def refit_error(layer: LayerProblem, keep_U: Tensor) -> float:
    return float(refit_errors(layer, layer.kept_inputs(keep_U)[None]))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("num_keep", [1, 4, 10])
def test_keeps_as_many_as_asked(width: int, num_keep: int) -> None:
    keep_U = SELECTORS.get("penalty").keep(problem(0, width=width), num_keep)
    assert keep_U.shape == (10,)
    assert int(keep_U.sum()) == num_keep


def test_beats_the_ranking_and_comes_near_the_best() -> None:
    """Sums over 30 problems of the error after the refit: against the l2 ranking's, and the best of all 252 sets."""
    ranked = found = best = 0.0
    for seed in range(30):
        layer = problem(seed)
        ranked += refit_error(layer, keep_best(SCORES.get("l2").score(layer), 5))
        found += refit_error(layer, SELECTORS.get("penalty").keep(layer, 5))
        best += float(refit_errors(layer, torch.tensor(list(combinations(range(10), 5)))).min())
    assert best <= found < 0.9 * ranked


def test_units_without_effect_go_first() -> None:
    layer = problem(1)
    layer.weight_OI[:, [2, 7]] = 0
    layer.fit.gram_II[[2, 7]] = 0
    layer.fit.gram_II[:, [2, 7]] = 0
    layer.fit.gram_II[[2, 7], [2, 7]] = 1e-3
    keep_U = SELECTORS.get("penalty").keep(layer, 8)
    assert (~keep_U).nonzero().flatten().tolist() == [2, 7]
