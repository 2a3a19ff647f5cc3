"""ADMM in the block loop: accepted only on held-out windows, never worse there, its objective in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from structprune import Recipe, prune
from structprune.errors import UnsupportedError
from structprune.results.report import PruneReport

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(source: Path, output: Path, text_file: Path, **changes: Any) -> PruneReport:
    settings: dict[str, Any] = {
        "method": "structprune",
        "sparsity": 0.4,
        "calibration": str(text_file),
        "num_samples": 12,
        "seq_len": 32,
        "multiple_of": 1,
        "dtype": "float32",
        **changes,
    }
    return prune(source, Recipe.build(**settings), output)


@pytest.mark.parametrize("target", ["local", "dense-path"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_proposals_are_judged_on_held_out_windows(
    family: str, target: str, request: pytest.FixtureRequest, text_file: Path, tmp_path: Path
) -> None:
    source = request.getfixturevalue(f"tiny_{family}")
    plain = pruned(source, tmp_path / "plain", text_file, target=target)
    report = pruned(source, tmp_path / "admm", text_file, target=target, solver="admm")
    assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes
    accepted = [block for block in report.blocks if block.statistics["admm_accepted"]]
    for block in report.blocks:
        better = block.statistics["admm_held_out_error"] < block.statistics["held_out_error"]
        assert bool(block.statistics["admm_accepted"]) == better
        assert len(block.objective) >= 2
        # The last entry may be the rise that ended the loop, and was thrown away.
        assert all(b <= a * (1 + 1e-4) for a, b in zip(block.objective[:-1], block.objective[1:-1], strict=False))
    # The first block's problem is the same with both solvers.
    first, plain_first = report.blocks[0], plain.blocks[0]
    assert first.error_mask_only == pytest.approx(plain_first.error_mask_only, rel=1e-5)
    assert first.statistics["damping"] == plain_first.statistics["damping"]
    assert all(block.objective == [] for block in plain.blocks)
    # On random weights and little text something is gained somewhere, so that both branches are run by these tests.
    if family == "opt":
        assert accepted


def test_duals_are_another_solver(tiny_opt: Path, text_file: Path, tmp_path: Path) -> None:
    plain = pruned(tiny_opt, tmp_path / "plain", text_file, solver="admm")
    duals = pruned(tiny_opt, tmp_path / "duals", text_file, solver="admm-duals")
    assert duals.memory.measured_peak_bytes <= duals.memory.planned_peak_bytes
    assert duals.recipe.solver == "admm-duals"
    # The same start, another way; and judged alike.
    assert duals.blocks[0].objective[1:] != plain.blocks[0].objective[1:]
    assert len(duals.blocks[0].objective) >= 2
    for block in duals.blocks:
        better = block.statistics["admm-duals_held_out_error"] < block.statistics["held_out_error"]
        assert bool(block.statistics["admm-duals_accepted"]) == better


def test_the_written_weights_are_those_of_the_proposal(tiny_opt: Path, text_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def producers(directory: Path) -> torch.Tensor:
        tensors = {n: t for path in directory.glob("*.safetensors") for n, t in load_file(path).items()}
        return tensors["model.decoder.layers.0.fc1.weight"]

    report = pruned(tiny_opt, tmp_path / "admm", text_file, solver="admm")
    assert report.blocks[0].statistics["admm_accepted"] == 1
    pruned(tiny_opt, tmp_path / "plain", text_file)
    assert producers(tmp_path / "admm").shape == producers(tmp_path / "plain").shape
    assert not torch.allclose(producers(tmp_path / "admm"), producers(tmp_path / "plain"))


def test_admm_needs_held_out_windows(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"judged on held-out windows; got --damping 0\.01"):
        pruned(tiny_llama, tmp_path / "out", text_file, solver="admm", damping=0.01)


def test_a_method_without_statistics_has_no_solver(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="measures nothing that a solver could use"):
        pruned(tiny_llama, tmp_path / "out", text_file, method="magnitude", solver="least-squares")
