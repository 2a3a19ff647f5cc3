"""Weights and activations that no calibration should meet: a finite result with its damping in the report, or an error.

What is refused (NaN and infinity, overflow) is in test_bad_input.py too, input by input; here is what is survived, and
that the error names the first place.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune import Recipe, prune
from structprune.cli import main
from structprune.errors import NumericalError
from structprune.results.report import PruneReport
from structprune.results.schema import BlockReport

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ["fasp", "osscar", "structprune", "spap"]
Change = Callable[[dict[str, Tensor]], None]


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings = {
        "method": "fasp",
        "calibration": str(text_file),
        "num_samples": 4,
        "seq_len": 32,
        "dtype": "float32",
        "multiple_of": 1,
    }
    return Recipe.build(**settings | {"sparsity": 0.4, "reload_check": False} | changes)


def changed(source: Path, target: Path, change: Change) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def mlp(tensors: dict[str, Tensor], block: int, name: str) -> Tensor:
    return tensors[f"model.layers.{block}.mlp.{name}_proj.weight"]


def finite(report: PruneReport, output: Path) -> None:
    """Every number of the report and every weight; and the damping is where a reader looks for it, within its bound."""
    assert math.isfinite(report.calibration.pruned_perplexity)
    for block in report.blocks:
        assert all(math.isfinite(value) for value in block.statistics.values()), block
        assert block.error is not None
        assert math.isfinite(block.error)
        damping_within_bounds(block)
    written = json.loads((output / "pruning_report.json").read_text())
    assert written["blocks"] == [block.model_dump() for block in report.blocks]
    for shard in output.glob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(shard).values())


def damping_within_bounds(block: BlockReport) -> None:
    """What was taken is recorded: at most six raises by ten, and the status says whether there were any."""
    if block.kept_units == block.num_units:
        return
    raises = block.statistics["damping_raises"]
    assert 0 <= raises <= 6
    assert block.status == ("damping-raised" if raises else "ok")
    # The largest ridge tried on held-out windows is ten times the mean diagonal; without a correction there is none.
    assert 0 < block.statistics.get("damping", 1.0) <= 10 ** (raises + 1)


def dead_channels(tensors: dict[str, Tensor]) -> None:
    """A third of the channels of each block never answers."""
    for block in (0, 1):
        mlp(tensors, block, "up")[:16] = 0


def dead_block(tensors: dict[str, Tensor]) -> None:
    """No channel answers: the Gram is zero."""
    mlp(tensors, 0, "up").zero_()


def zero_columns(tensors: dict[str, Tensor]) -> None:
    """Nothing reads some channels."""
    mlp(tensors, 0, "down")[:, ::3] = 0
    mlp(tensors, 1, "down").zero_()


def equal_channels(tensors: dict[str, Tensor]) -> None:
    """Channels in threes that say the same: the Gram has a third of its rank."""
    for name in ("up", "gate"):
        weight = mlp(tensors, 0, name)
        weight[16:32] = weight[:16]
        weight[32:] = weight[:16]


def massive_activations(tensors: dict[str, Tensor]) -> None:
    """Two channels a hundred thousand times as large as the others, as real models have them."""
    mlp(tensors, 0, "up")[5] *= 1e5
    mlp(tensors, 1, "up")[7] *= 1e5
    mlp(tensors, 1, "down")[:, 7] *= 1e-5


def tiny_weights(tensors: dict[str, Tensor]) -> None:
    """Activations whose squares underflow in float32."""
    mlp(tensors, 1, "up").mul_(1e-25)


CHANGES = [dead_channels, dead_block, zero_columns, equal_channels, massive_activations, tiny_weights]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_survived(change: Change, method: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    source = changed(tiny_llama, tmp_path / "source", change)
    report = prune(source, recipe(text_file, method=method), tmp_path / "out")
    finite(report, tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_channels(method: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """16 tokens for 48 channels."""
    report = prune(tiny_llama, recipe(text_file, method=method, num_samples=2, seq_len=8), tmp_path / "out")
    finite(report, tmp_path / "out")


def test_dead_channels_go_first(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """And the others' weights need no repair: the error is zero."""
    source = changed(tiny_llama, tmp_path / "source", dead_channels)
    report = prune(source, recipe(text_file, sparsity=1 / 3), tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "pruning_manifest.json").read_text())["kept_indices"]
    assert all(kept[str(block)]["mlp"] == list(range(16, 48)) for block in (0, 1))
    assert all(block.error is not None and block.error < 1e-10 for block in report.blocks)


def test_a_ridge_too_small_is_raised_and_reported(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """A Gram of eight tokens is indefinite by float32's rounding, 1e-8 of it: the ridge grows until it holds."""
    report = prune(tiny_llama, recipe(text_file, damping=1e-12, num_samples=1, seq_len=8), tmp_path / "out")
    raised = [block for block in report.blocks if block.statistics["damping_raises"] > 0]
    assert raised
    for block in raised:
        damping_within_bounds(block)
        assert block.statistics["damping"] == pytest.approx(1e-12 * 10 ** block.statistics["damping_raises"])


@pytest.mark.parametrize("method", ["fasp", "structprune"])
def test_a_ridge_is_not_raised_for_ever(method: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """After six raises the run final_states, and says in which block."""
    with pytest.raises(NumericalError, match="stays indefinite") as caught:
        prune(
            tiny_llama,
            recipe(text_file, method=method, damping=1e-18, num_samples=1, seq_len=8),
            tmp_path / "out",
        )
    assert str(caught.value).startswith("block ")
    assert "damping up to 1e-12" in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "factor", "dtype", "expected"),
    [
        ("model.layers.1.mlp.up_proj.weight", 1e30, "float32", "block 1 mlp: 48 of 48 activations are NaN or infinite"),
        (
            "model.layers.1.self_attn.v_proj.weight",
            1e5,
            "float16",
            "block 1: the hidden states after the block are NaN",
        ),
        ("model.layers.0.mlp.up_proj.weight", 1e5, "float16", "block 0"),
    ],
)
def test_the_first_place_is_named(
    name: str, factor: float, dtype: str, expected: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Overflow in one block; float16 ends at 65,504."""

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[name] *= factor

    source = changed(tiny_llama, tmp_path / "source", enlarge)
    with pytest.raises(NumericalError) as caught:
        prune(source, recipe(text_file, dtype=dtype), tmp_path / "out")
    assert str(caught.value).startswith(expected)
    assert "--dtype float32" in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("method", ["structprune", "llm-pruner", "flap", "slicegpt", "depth"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_tensor_that_is_not_finite_is_named(
    bad: float, method: str, tiny_llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every pipeline, with exit code 2 and nothing left behind."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        mlp(tensors, 1, "gate")[3, 4] = bad

    source = changed(tiny_llama, tmp_path / "source", spoil)
    arguments = ["prune", source, "-o", tmp_path / "out", "--calibration", text_file, "--method", method, "--quiet"]
    with pytest.raises(SystemExit) as caught:
        main(
            [str(a) for a in (*arguments, "--num-samples", 4, "--seq-len", 32, "--sparsity", 0.3, "--dtype", "float32")]
        )
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "tensor 'model.layers.1.mlp.gate_proj.weight' holds NaN or infinity" in message
    assert len(message.splitlines()) == 1
    assert not list(tmp_path.glob("out*"))
