"""Whole experts: the saliency is that of the stock model, and the output is that model with the others masked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from structprune import Recipe, prune
from structprune.api import plan
from structprune.architectures.stock.model import StockModel
from structprune.calibration.context import SourceContext, draw_windows
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import InputError, StructPruneError, UnsupportedError
from structprune.results.report import PruneReport
from support.models import save_tiny
from support.traced import save_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_EXPERTS, NUM_BLOCKS = 4, 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("mixture") / "qwen3_moe", num_blocks=NUM_BLOCKS)


def recipe(text_file: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"method": "reap", "sparsity": 0.3, "calibration": str(text_file), "dtype": "float32"}
    return Recipe.build(**{**settings, "num_samples": 6, "seq_len": 32, "device": "cpu", **changes})


def kept_of(output: Path) -> list[list[int]]:
    manifest = json.loads((output / "pruning_manifest.json").read_text(encoding="utf-8"))
    return [manifest["kept_indices"][str(block)]["expert"] for block in range(NUM_BLOCKS)]


def windows(source: Path, text_file: Path) -> Tensor:
    """The windows that a run draws, by the tokenizer's own call."""
    tokenizer = AutoTokenizer.from_pretrained(source)

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    def no_sampling(*_: object) -> Tensor:
        raise AssertionError("the text is given")

    context = SourceContext(encode=encode, render=str, sample=no_sampling, num_samples=6, seq_len=32, seed=0)
    return draw_windows(text_file.read_text(), "text", context).ids_NS


def stock_saliency(source: Path, ids_NS: Tensor) -> list[Tensor]:
    """Per block S_j of the paper, from the stock model's own router and stacked weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(source).eval()
    found: list[Tensor] = []

    def hook(mixture: Any, args: tuple[Tensor, ...], _: object) -> None:
        x_TD = args[0].reshape(-1, args[0].shape[-1])
        _, weights_TK, experts_TK = mixture.gate(x_TD)
        saliency: list[Tensor] = []
        for number in range(NUM_EXPERTS):
            gate_TI, up_TI = (x_TD @ mixture.experts.gate_up_proj[number].T).chunk(2, dim=-1)
            output_TD = (torch.nn.functional.silu(gate_TI) * up_TI) @ mixture.experts.down_proj[number].T
            share_T = (weights_TK * (experts_TK == number)).sum(dim=-1)
            sent_T = (experts_TK == number).any(dim=-1)
            saliency.append((share_T * output_TD.norm(dim=-1))[sent_T].mean())
        found.append(torch.stack(saliency))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(hook)
    with torch.no_grad():
        model(input_ids=ids_NS)
    return found


def test_the_least_salient_experts_go(source: Path, text_file: Path, tmp_path: Path) -> None:
    report = prune(source, recipe(text_file, sparsity=0.5), tmp_path / "out")
    saliency = stock_saliency(source, windows(source, text_file))
    expected = [sorted(block_E.topk(2).indices.tolist()) for block_E in saliency]
    assert kept_of(tmp_path / "out") == expected
    assert len({tuple(kept) for kept in expected}) > 1, "the blocks should not agree by chance"
    for block, block_E in zip(report.blocks, saliency, strict=True):
        gone = 1 - float(block_E[expected[block.block]].sum() / block_E.sum())
        assert block.statistics["saliency_removed"] == pytest.approx(gone, rel=1e-4)


def test_the_output_is_the_stock_model_whose_router_cannot_choose_the_others(
    source: Path, text_file: Path, tmp_path: Path
) -> None:
    prune(source, recipe(text_file, sparsity=0.5), tmp_path / "out")
    dense: Any = AutoModelForCausalLM.from_pretrained(source).eval()
    pruned: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert pruned.config.num_experts == 2
    for layer, kept in zip(dense.model.layers, kept_of(tmp_path / "out"), strict=True):
        gone = [number for number in range(NUM_EXPERTS) if number not in kept]
        gate = layer.mlp.gate

        def masked(x_TD: Tensor, gate: Any = gate, gone: list[int] = gone) -> tuple[Tensor, Tensor, Tensor]:
            logits_TE = x_TD.reshape(-1, x_TD.shape[-1]) @ gate.weight.T
            logits_TE[:, gone] = -torch.inf
            weights_TK, experts_TK = logits_TE.softmax(dim=-1).topk(gate.top_k, dim=-1)
            return logits_TE, weights_TK / weights_TK.sum(dim=-1, keepdim=True), experts_TK

        gate.forward = masked
    ids_BS = torch.randint(0, dense.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids_BS).logits, dense(ids_BS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sparsity", "left"), [(0.0, 4), (0.25, 3), (0.3, 2), (0.5, 2)])
def test_what_is_left_was_forecast(sparsity: float, left: int, source: Path, text_file: Path, tmp_path: Path) -> None:
    asked = recipe(text_file, sparsity=sparsity)
    foreseen = plan(source, asked)
    report = prune(source, asked, tmp_path / "out")
    assert [block.kept_units for block in report.blocks] == [left] * NUM_BLOCKS
    assert foreseen.forecast.num_parameters == report.size.parameters_after
    assert StockModel(CheckpointReader(tmp_path / "out")).layout.num_parameters == report.size.parameters_after
    assert report.size.removed_share_of_scope == pytest.approx(1 - left / NUM_EXPERTS)
    assert report.reload.mode == "whole"
    assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes
    if left == NUM_EXPERTS:
        before, after = load_file(source / "model.safetensors"), tensors_of(tmp_path / "out")
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_channels_of_the_experts_that_are_left_can_go(source: Path, text_file: Path, tmp_path: Path) -> None:
    prune(source, recipe(text_file, sparsity=0.5), tmp_path / "fewer")
    prune(tmp_path / "fewer", recipe(text_file, method="fasp", multiple_of=8), tmp_path / "narrower")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "narrower").config
    assert (config.num_experts, config.moe_intermediate_size) == (2, 32)


def test_the_older_name_of_the_count_stays(source: Path, text_file: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(source, older)
    config = json.loads((older / "config.json").read_text(encoding="utf-8"))
    config["num_experts"] = config.pop("num_local_experts")
    (older / "config.json").write_text(json.dumps(config), encoding="utf-8")
    prune(older, recipe(text_file), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (written["num_experts"], written.get("num_local_experts")) == (2, None)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def test_an_expert_without_tokens_goes_first(source: Path, text_file: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    for block in range(NUM_BLOCKS):
        # Equal shares for all: every token goes to the same two.
        tensors[f"model.layers.{block}.mlp.gate.weight"].zero_()
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    report: PruneReport = prune(changed, recipe(text_file, sparsity=0.5), tmp_path / "out")
    assert [block.statistics["experts_without_tokens"] for block in report.blocks] == [2.0] * NUM_BLOCKS
    assert [block.statistics["saliency_removed"] for block in report.blocks] == [0.0] * NUM_BLOCKS


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sparsity": 0.6}, InputError, "fewer experts would be left than a token is sent to.*3 of 4.*at most 2"),
        ({"scope": "all"}, UnsupportedError, "whole experts.*--scope all.*--scope mlp"),
        ({"score": "wanda"}, UnsupportedError, "--score has no meaning for method 'reap', which removes whole experts"),
        ({"multiple_of": 8}, UnsupportedError, "--multiple-of has no meaning for method 'reap'"),
        ({"structure": "per-layer"}, UnsupportedError, "--structure has no meaning for method 'reap'"),
        ({"protect_first": 1}, UnsupportedError, "--protect-first has no meaning for method 'reap'"),
        ({"solver": "least-squares"}, UnsupportedError, "--solver has no meaning for method 'reap'"),
    ],
)
def test_what_is_refused(
    changes: dict[str, Any],
    error: type[StructPruneError],
    message: str,
    source: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        prune(source, recipe(text_file, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_experts(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)removes experts of a mixture.*llama.*qwen3_moe"):
        prune(tiny_llama, recipe(text_file), tmp_path / "out")


def test_blocks_without_experts_stay(text_file: Path, tmp_path: Path) -> None:
    """DeepSeek V3 begins with plain MLPs; its router has a correction for each expert beside its rows."""
    source = save_decoder("deepseek_v3", tmp_path / "model", n_group=1)
    report = prune(source, recipe(text_file, sparsity=0.5), tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), tensors_of(tmp_path / "out")
    assert [(block.block, block.kept_units) for block in report.blocks] == [(1, 2), (2, 2), (3, 2)]
    assert report.size.removed_share_of_scope == pytest.approx(0.4, abs=0.05), "the expert for all tokens stays"
    for name, tensor in after.items():
        if name.startswith("model.layers.0."):
            assert torch.equal(tensor, before[name])
    kept = json.loads((tmp_path / "out" / "pruning_manifest.json").read_text())["kept_indices"]
    assert set(kept) == {"1", "2", "3"}
    for block in (1, 2, 3):
        for part in ("weight", "e_score_correction_bias"):
            name = f"model.layers.{block}.mlp.gate.{part}"
            assert torch.equal(after[name], before[name][kept[str(block)]["expert"]])
    assert report.reload.mode == "whole"


def test_a_router_of_sets_keeps_its_experts(text_file: Path, tmp_path: Path) -> None:
    source = save_decoder("deepseek_v3", tmp_path / "model", n_group=2)
    with pytest.raises(UnsupportedError, match="chooses sets of experts first"):
        prune(source, recipe(text_file, sparsity=0.5), tmp_path / "out")
