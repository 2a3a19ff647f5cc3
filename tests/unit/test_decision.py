"""The objective of a decision: against least squares by another way, and in the report.

Shape suffixes: T tokens, I inputs, O outputs, U units, K kept inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import structprune
from structprune.recipe import Recipe
from structprune.scores.selection import decision_objective
from structprune.types import LayerProblem, Moments


@pytest.mark.parametrize("width", [1, 3])
def test_equals_the_residual_of_lstsq(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x_TI = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    weight_OI = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    problem = LayerProblem(
        weight_OI=weight_OI,
        fit=Moments(gram_II=x_TI.T @ x_TI, num_tokens=200),
        width=width,
        damping=1e-12,
        producer_norms_MU=torch.ones(1, 12 // width),
    )
    keep_U = torch.arange(12 // width) % 2 == 0
    kept_K = problem.kept_inputs(keep_U)
    wanted_TO = x_TI @ weight_OI.T
    solved_KO = torch.linalg.lstsq(x_TI[:, kept_K], wanted_TO).solution
    residual_TO = wanted_TO - x_TI[:, kept_K] @ solved_KO
    expected = float(residual_TO.square().sum() / wanted_TO.square().sum())
    assert decision_objective(problem, keep_U) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["spap", "osscar"])
def test_the_report_says_what_the_search_was_worth(
    method: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    # With one ridge the search and the refit are of the same problem.
    asked: dict[str, Any] = {"damping": 1e-2} if method == "osscar" else {}
    asked |= {"calibration": str(text_file), "num_samples": 8, "seq_len": 32, "dtype": "float32", "multiple_of": 1}
    recipe = Recipe.build(method=method, **asked)
    report = structprune.prune(tiny_llama, recipe, tmp_path / "out")
    for block in report.blocks:
        found, ranked = (block.statistics[f"decision_objective{name}"] for name in ("", "_l2"))
        assert 0 < found < ranked < 1
        if method == "osscar":
            # The ridge's part of the objective is no error.
            assert block.error is not None
            assert found / 2 < block.error < found
