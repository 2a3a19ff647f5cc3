"""LLM-Pruner from the command line and from Python: what goes, what is protected, and that it stays within its plan.

Shape suffixes: N windows, S positions, U units.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import structprune
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.architectures.stock.loading import load_model
from structprune.calibration.context import consecutive_windows
from structprune.cli import main
from structprune.errors import MemoryBudgetError
from structprune.recipe import Recipe
from structprune.results.report import PruneReport
from structprune.scores import SCORES
from support.models import TINY_MODELS, llama_config, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SEQ_LEN, NUM_SAMPLES = 32, 8


def pruned(source: Path, output: Path, text_file: Path, **changes: Any) -> PruneReport:
    settings: dict[str, Any] = {
        "method": "llm-pruner",
        "calibration": str(text_file),
        "num_samples": NUM_SAMPLES,
        "seq_len": SEQ_LEN,
        "dtype": "float32",
        "multiple_of": 1,
        **changes,
    }
    report = structprune.prune(source, Recipe.build(**settings), output)
    assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes
    return report


def kept_indices(output: Path) -> dict[str, dict[str, list[int]]]:
    return json.loads((output / "pruning_manifest.json").read_text(encoding="utf-8"))["kept_indices"]


def reloaded_perplexity(directory: Path, text_file: Path, num_windows: int) -> float:
    windows_NS = consecutive_windows(TextEncoder(directory).encode(text_file.read_text()), SEQ_LEN, "text", "test")
    order = torch.randperm(len(windows_NS), generator=torch.Generator().manual_seed(0))
    ids_NS = windows_NS[order[:NUM_SAMPLES]][:num_windows]
    model = load_model(directory, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return float(model(input_ids=ids_NS, labels=ids_NS).loss.exp())


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of sixteen blocks: two and one are protected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_MODELS, "deep", lambda: LlamaForCausalLM(llama_config(num_hidden_layers=16)))
        return save_tiny("deep", tmp_path_factory.mktemp("deep") / "model")


@pytest.fixture
def eight_windows(text_file: Path, tmp_path: Path) -> Path:
    """A text of exactly as many windows as are asked for, so that all are taken, whatever their order."""
    path = tmp_path / "text.txt"
    path.write_bytes(text_file.read_bytes()[: NUM_SAMPLES * SEQ_LEN])
    return path


def first_order(source: Path, text: Path) -> list[Tensor]:
    """Per block, sum |w g| of each MLP channel, from whole-model gradients of stock transformers' loss."""
    model = AutoModelForCausalLM.from_pretrained(source).double()
    ids = AutoTokenizer.from_pretrained(source)(text.read_text(), add_special_tokens=False)["input_ids"]
    ids_NS = torch.tensor(ids).reshape(NUM_SAMPLES, SEQ_LEN)
    model(input_ids=ids_NS, labels=ids_NS).loss.backward()
    found: list[Tensor] = []
    for layer in model.model.layers:
        gate, up, down = (m.weight for m in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj))
        score_U = (gate * gate.grad).abs().sum(dim=1) + (up * up.grad).abs().sum(dim=1)
        score_U = (score_U + (down * down.grad).abs().sum(dim=0)).detach()
        found.append(score_U)
    return found


def test_the_lowest_by_whole_model_gradients_go(tiny_llama: Path, eight_windows: Path, tmp_path: Path) -> None:
    report = pruned(tiny_llama, tmp_path / "out", eight_windows, sparsity=0.4, held_out=0)
    kept = kept_indices(tmp_path / "out")
    for index, score_U in enumerate(first_order(tiny_llama, eight_windows)):
        assert kept[str(index)]["mlp"] == sorted(score_U.topk(28).indices.tolist())
    # Nothing is measured but the gradients.
    assert [b.error for b in report.blocks] == [None, None]


def test_global_ranking(tiny_llama: Path, eight_windows: Path, tmp_path: Path) -> None:
    changes = {"allocator": "closed-form", "min_retention": 0.01, "sparsity": 0.25, "held_out": 0}
    pruned(tiny_llama, tmp_path / "out", eight_windows, **changes)
    lowest = torch.cat(first_order(tiny_llama, eight_windows)).sort().indices[:24].tolist()
    kept = kept_indices(tmp_path / "out")
    removed = [48 * block + unit for block in range(2) for unit in range(48) if unit not in kept[str(block)]["mlp"]]
    assert removed == sorted(lowest)


def test_command_line(capsys: pytest.CaptureFixture[str], deep: Path, text_file: Path, tmp_path: Path) -> None:
    """Outer blocks keep their widths, the others lose so much more; stock layers load what is written."""
    output = tmp_path / "out"
    flags = ["--method", "llm-pruner", "--scope", "mlp", "--sparsity", "0.25", "--calibration", str(text_file)]
    flags += ["--num-samples", "8", "--seq-len", "32", "--multiple-of", "1", "--dtype", "float32"]
    with pytest.raises(SystemExit) as caught:
        main(["prune", str(deep), "-o", str(output), "--quiet", "--json", *flags])
    assert caught.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["recipe"]["protect_first"], report["recipe"]["protect_last"]) == (2, 1)
    # 16 * 48 / 4 = 192 channels from 13 blocks.
    assert [b["kept_units"] for b in report["blocks"]] == [48, 48, *[48 - 15] * 13, 48]
    assert 0.25 <= report["size"]["removed_share_of_scope"] < 0.25 + 13 / (16 * 48)
    assert report["memory"]["measured_peak_bytes"] <= report["memory"]["planned_peak_bytes"]
    perplexity = reloaded_perplexity(output, text_file, report["calibration"]["perplexity_windows"])
    assert perplexity == pytest.approx(report["calibration"]["pruned_perplexity"], rel=1e-4)
    assert perplexity != pytest.approx(report["calibration"]["dense_perplexity"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "protected"),
    [
        ({"protect_first": 0, "protect_last": 0}, set()),
        ({"protect_first": 1}, {0, 15}),
        ({"protect_last": 3}, {0, 1, 13, 14, 15}),
        ({"structure": "uniform"}, set()),
        ({"allocator": "closed-form"}, {0, 1, 15}),
    ],
    ids=str,
)
def test_the_users_numbers_win(
    changes: dict[str, Any], protected: set[int], deep: Path, text_file: Path, tmp_path: Path
) -> None:
    report = pruned(deep, tmp_path / "out", text_file, sparsity=0.3, sensitivity_samples=2, num_samples=2, **changes)
    if "allocator" not in changes:
        assert {b.block for b in report.blocks if b.kept_units == 48} == protected
    assert all(b.kept_units == 48 for b in report.blocks if b.block in protected)
    assert report.size.removed_share_of_scope >= 0.3
    if not protected:
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 33


@pytest.mark.parametrize("head_units", ["kv-group", "query-head"])
@pytest.mark.parametrize("allocator", ["uniform", "closed-form"])
def test_attention_and_mlp(allocator: str, head_units: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    changes = {"scope": "all", "sparsity": 0.3, "allocator": allocator, "head_units": head_units}
    report = pruned(tiny_llama, tmp_path / "out", text_file, **changes)
    assert report.size.removed_share_of_scope >= 0.3
    assert {b.kind for b in report.blocks} == {"attention", "mlp"}
    perplexity = reloaded_perplexity(tmp_path / "out", text_file, report.calibration.perplexity_windows)
    assert perplexity == pytest.approx(report.calibration.pruned_perplexity, rel=1e-4)
    # Measured once, on the dense model: the same units go again.
    pruned(tiny_llama, tmp_path / "again", text_file, **changes)
    assert kept_indices(tmp_path / "again") == kept_indices(tmp_path / "out")


def test_a_removed_half_is_not_measured_again(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """The second run's source lacks halves; their blocks have no gradients by them."""
    changes = {"scope": "all", "allocator": "closed-form"}
    first = pruned(tiny_llama, tmp_path / "first", text_file, sparsity=0.6, allow_block_removal=True, **changes)
    removed = {(b.block, b.kind) for b in first.blocks if b.status == "removed"}
    assert removed
    second = pruned(tmp_path / "first", tmp_path / "second", text_file, sparsity=0.1, **changes)
    assert {(b.block, b.kind) for b in second.blocks} == {(b.block, b.kind) for b in first.blocks} - removed
    perplexity = reloaded_perplexity(tmp_path / "second", text_file, second.calibration.perplexity_windows)
    assert perplexity == pytest.approx(second.calibration.pruned_perplexity, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_variant(family: str, request: pytest.FixtureRequest, text_file: Path, tmp_path: Path) -> None:
    source = request.getfixturevalue(f"tiny_{family}")
    kept: dict[str, Any] = {}
    for score in [name for name in SCORES if "gradients" in SCORES.get(name).reads]:
        report = pruned(source, tmp_path / score, text_file, sparsity=0.4, score=score)
        assert report.recipe.score == score
        kept[score] = kept_indices(tmp_path / score)
    assert len({json.dumps(indices) for indices in kept.values()}) >= 3


def test_bfloat16(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Gradients in half precision, sums in float32: mostly the same units."""
    pruned(tiny_llama, tmp_path / "wide", text_file, sparsity=0.4)
    pruned(tiny_llama, tmp_path / "half", text_file, sparsity=0.4, dtype="bfloat16")
    wide, half = kept_indices(tmp_path / "wide"), kept_indices(tmp_path / "half")
    for block in wide:
        assert len(set(wide[block]["mlp"]) & set(half[block]["mlp"])) >= 26


def test_gradients_by_the_weights_are_in_the_plan(text_file: Path, tmp_path: Path) -> None:
    """An MLP wide enough that what is held with its gradients passes every other phase."""
    wide = {"hidden_size": 512, "intermediate_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_MODELS, "wide", lambda: LlamaForCausalLM(llama_config(**wide)))
        source = save_tiny("wide", tmp_path / "model", dtype=torch.bfloat16)
    changes = {"dtype": "bfloat16", "num_samples": 3, "sensitivity_samples": 3, "multiple_of": 32}
    memory = pruned(source, tmp_path / "out", text_file, **changes).memory
    others = [num_bytes for phase, num_bytes in memory.phases.items() if phase != "sensitivity: backward"]
    # 12 million weights: two float32 sums and one window's gradients.
    assert memory.planned_peak_bytes > max(others) + 12 * 10**6 * (4 + 4 + 2)
    assert max(others) < memory.measured_peak_bytes <= memory.planned_peak_bytes
    tight = changes | {"memory": memory.planned_peak_bytes - 2**20}
    with pytest.raises(MemoryBudgetError, match="phase 'sensitivity: backward'"):
        pruned(source, tmp_path / "tight", text_file, **tight)
