"""Attention shrinks by KV groups: uneven per-layer models and uniform ones that stock code loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralForCausalLM

import structprune
from structprune.architectures.sources.resolve import resolve_model
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.architectures.stock.loading import load_model
from structprune.calibration.context import consecutive_windows
from structprune.errors import UnsupportedError
from structprune.recipe import Recipe
from structprune.results.report import PruneReport
from support.models import TINY_MODELS, llama_config, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SEQ_LEN, NUM_SAMPLES = 32, 8
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module", params=["grouped", "llama3-rope"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight query heads of width 4 in four KV groups; without one group, hidden_size 32 is no multiple of six."""
    changes: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
    if request.param == "llama3-rope":
        changes |= {"rope_parameters": LLAMA3_ROPE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_MODELS, "wide", lambda: LlamaForCausalLM(llama_config(**changes)))
        return save_tiny("wide", tmp_path_factory.mktemp("attention") / "model")


def pruned(source: Path, output: Path, text_file: Path, **changes: Any) -> PruneReport:
    recipe = Recipe.build(
        method="structprune",
        calibration=str(text_file),
        num_samples=NUM_SAMPLES,
        seq_len=SEQ_LEN,
        dtype="float32",
        multiple_of=1,
        **changes,
    )
    return structprune.prune(source, recipe, output)


def reloaded_perplexity(directory: Path, text_file: Path, num_windows: int) -> float:
    windows_NS = consecutive_windows(TextEncoder(directory).encode(text_file.read_text()), SEQ_LEN, "text", "test")
    order = torch.randperm(len(windows_NS), generator=torch.Generator().manual_seed(0))
    ids_NS = windows_NS[order[:NUM_SAMPLES]][:num_windows]
    model = load_model(resolve_model(str(directory)), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        logits_TV = model(input_ids=ids_NS).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits_TV, ids_NS[:, 1:].flatten()).exp())


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("scope", ["attention", "all"])
def test_uneven(scope: str, source: Path, text_file: Path, tmp_path: Path) -> None:
    report = pruned(source, tmp_path / "out", text_file, scope=scope, sparsity=0.4)
    assert report.size.removed_share_of_scope >= 0.4
    layers = read_config(tmp_path / "out")["per_layer_config"]
    for block in report.blocks:
        fields = layers[str(block.block)]
        if block.kind == "attention":
            assert fields["num_key_value_heads"] == block.kept_units
            assert fields["num_attention_heads"] == 2 * block.kept_units
        else:
            assert fields["intermediate_size"] == block.kept_units
    assert sum(b.kept_units for b in report.blocks if b.kind == "attention") < 8
    assert (len({b.kind for b in report.blocks}) == 2) == (scope == "all")
    perplexity = reloaded_perplexity(tmp_path / "out", text_file, report.calibration.perplexity_windows)
    assert perplexity == pytest.approx(report.calibration.pruned_perplexity, rel=1e-4)


@pytest.mark.parametrize("scope", ["attention", "all"])
def test_uniform_llama_loads_in_stock_code(scope: str, source: Path, text_file: Path, tmp_path: Path) -> None:
    report = pruned(source, tmp_path / "out", text_file, scope=scope, sparsity=0.25, structure="uniform")
    config = read_config(tmp_path / "out")
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["head_dim"]) == (3, 6, 4)
    assert (config["model_type"], config["sliding_window"]) == ("mistral", None)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, MistralForCausalLM)
    perplexity = reloaded_perplexity(tmp_path / "out", text_file, report.calibration.perplexity_windows)
    assert perplexity == pytest.approx(report.calibration.pruned_perplexity, rel=1e-4)


def test_uniform_stays_llama_where_llama_takes_it(source: Path, text_file: Path, tmp_path: Path) -> None:
    pruned(source, tmp_path / "out", text_file, scope="attention", sparsity=0.5, structure="uniform")
    config = read_config(tmp_path / "out")
    assert (config["model_type"], config["num_attention_heads"], config["head_dim"]) == ("llama", 4, 4)


@pytest.fixture(scope="module", params=["unbiased", "biased"])
def grouped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve query heads of width 4 in three KV groups: four query-head units."""
    changes = {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3}
    biased = {"attention_bias": request.param == "biased"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_MODELS, "grouped", lambda: LlamaForCausalLM(llama_config(**changes, **biased)))
        return save_tiny("grouped", tmp_path_factory.mktemp("grouped") / "model")


@pytest.mark.parametrize("changes", [{}, {"structure": "uniform"}, {"target": "local"}])
def test_query_heads(changes: dict[str, Any], grouped: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = pruned(grouped, output, text_file, scope="attention", head_units="query-head", sparsity=0.3, **changes)
    assert {b.num_units for b in report.blocks} == {4}
    assert sum(b.kept_units for b in report.blocks) < 8
    tensors = {n: t for path in output.glob("*.safetensors") for n, t in load_file(path).items()}
    for block in report.blocks:
        prefix = f"model.layers.{block.block}.self_attn"
        assert tensors[f"{prefix}.q_proj.weight"].shape == (12 * block.kept_units, 48)
        assert tensors[f"{prefix}.k_proj.weight"].shape == (12, 48)
        assert tensors[f"{prefix}.o_proj.weight"].shape == (48, 12 * block.kept_units)
    perplexity = reloaded_perplexity(output, text_file, report.calibration.perplexity_windows)
    assert perplexity == pytest.approx(report.calibration.pruned_perplexity, rel=1e-4)


def test_a_query_head_that_adds_nothing_goes_first(grouped: Path, text_file: Path, tmp_path: Path) -> None:
    """The third query head of every KV group of block 0, and the first of block 1, do not reach the output."""
    source = tmp_path / "source"
    model: Any = LlamaForCausalLM.from_pretrained(grouped)
    with torch.no_grad():
        for block, head in ((0, 2), (1, 0)):
            for group in range(3):
                first = (group * 4 + head) * 4
                model.model.layers[block].self_attn.o_proj.weight[:, first : first + 4] *= 1e-6
    model.save_pretrained(source)
    for path in grouped.glob("tokenizer*"):
        (source / path.name).write_bytes(path.read_bytes())
    report = pruned(source, tmp_path / "out", text_file, scope="attention", head_units="query-head", sparsity=0.15)
    manifest = json.loads((tmp_path / "out" / "pruning_manifest.json").read_text(encoding="utf-8"))
    assert manifest["kept_indices"] == {"0": {"attention": [0, 1, 3]}, "1": {"attention": [1, 2, 3]}}
    calibration = report.calibration
    assert calibration.pruned_perplexity == pytest.approx(calibration.dense_perplexity, rel=0.01)


def test_query_heads_need_groups(text_file: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_MODELS, "mha", lambda: LlamaForCausalLM(llama_config(num_key_value_heads=4)))
        source = save_tiny("mha", tmp_path / "model")
    with pytest.raises(UnsupportedError, match="every KV head has one query head"):
        pruned(source, tmp_path / "out", text_file, scope="attention", head_units="query-head")


def test_nothing_removed_is_the_same_model(source: Path, text_file: Path, tmp_path: Path) -> None:
    report = pruned(source, tmp_path / "out", text_file, scope="all", sparsity=0.0)
    assert report.size.parameters_after == report.size.parameters_before
    assert report.calibration.pruned_perplexity == pytest.approx(report.calibration.dense_perplexity, rel=1e-6)


def test_opt_refuses_heads(tiny_opt: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="stock opt cannot express fewer attention units"):
        pruned(tiny_opt, tmp_path / "out", text_file, scope="all", sparsity=0.3)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def idle_sublayers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of three blocks; the attention of block 0 and the MLP of block 1 add next to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_MODELS, "three", lambda: LlamaForCausalLM(llama_config(num_hidden_layers=3)))
        directory = save_tiny("three", tmp_path_factory.mktemp("idle") / "model")
    model = LlamaForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.o_proj.weight").mul_(1e-6)
        model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1e-6)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("target", ["local", "dense-path"])
def test_sublayers_that_add_nothing_are_removed(
    target: str, idle_sublayers: Path, text_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    report = pruned(
        idle_sublayers, output, text_file, scope="all", sparsity=0.3333, target=target, allow_block_removal=True
    )
    assert read_config(output)["structprune_removed"] == {"0": ["attention"], "1": ["mlp"]}
    assert [(b.block, b.kind) for b in report.blocks if b.status == "removed"] == [(0, "attention"), (1, "mlp")]
    names = {name for path in output.glob("*.safetensors") for name in load_file(path)}
    assert not any(name.startswith(("model.layers.0.self_attn", "model.layers.1.mlp")) for name in names)
    assert not {"model.layers.0.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"} & names
    perplexity = reloaded_perplexity(output, text_file, report.calibration.perplexity_windows)
    assert perplexity == pytest.approx(report.calibration.pruned_perplexity, rel=1e-4)
    assert perplexity == pytest.approx(report.calibration.dense_perplexity, rel=0.05)

    again = pruned(output, tmp_path / "again", text_file, scope="all", sparsity=0.1, target=target)
    assert read_config(tmp_path / "again")["structprune_removed"] == {"0": ["attention"], "1": ["mlp"]}
    assert {(b.block, b.kind) for b in again.blocks} == {(0, "mlp"), (1, "attention"), (2, "attention"), (2, "mlp")}
    perplexity = reloaded_perplexity(tmp_path / "again", text_file, again.calibration.perplexity_windows)
    assert perplexity == pytest.approx(again.calibration.pruned_perplexity, rel=1e-4)


def test_without_the_flag_every_sublayer_keeps_something(idle_sublayers: Path, text_file: Path, tmp_path: Path) -> None:
    report = pruned(idle_sublayers, tmp_path / "out", text_file, scope="all", sparsity=0.2)
    assert min(b.kept_units for b in report.blocks) >= 1
    assert "structprune_removed" not in read_config(tmp_path / "out")


def test_uniform_removes_no_sublayer(idle_sublayers: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="takes the same share of every block"):
        pruned(idle_sublayers, tmp_path / "out", text_file, structure="uniform", allow_block_removal=True)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("structure", ["uniform", "per-layer"])
def test_flap_adds_what_removed_units_give_on_average(
    family: str, structure: str, request: pytest.FixtureRequest, text_file: Path, tmp_path: Path
) -> None:
    source = request.getfixturevalue(f"tiny_{family}")
    changes: dict[str, Any] = {"method": "flap", "sparsity": 0.3, "structure": structure}
    changes |= {"scope": "all" if family == "llama" else "mlp"}
    report = flapped(source, tmp_path / "out", text_file, **changes)
    # The biases that are added count against what is removed.
    assert report.size.removed_share_of_scope >= (0.27 if family == "llama" else 0.3)
    config = read_config(tmp_path / "out")
    if family == "llama":
        assert (config["mlp_bias"], config["attention_bias"]) == (True, True)
    assert all(b.error is not None and b.error_mask_only is not None for b in report.blocks)
    assert all((b.error or 0) <= (b.error_mask_only or 0) for b in report.blocks)
    assert any((b.error or 0) < (b.error_mask_only or 0) for b in report.blocks)
    perplexity = reloaded_perplexity(tmp_path / "out", text_file, report.calibration.perplexity_windows)
    assert perplexity == pytest.approx(report.calibration.pruned_perplexity, rel=1e-4)
    again = flapped(tmp_path / "out", tmp_path / "again", text_file, method="flap", sparsity=0.2, scope="mlp")
    perplexity = reloaded_perplexity(tmp_path / "again", text_file, again.calibration.perplexity_windows)
    assert perplexity == pytest.approx(again.calibration.pruned_perplexity, rel=1e-4)


def test_the_bias_is_the_mean_of_what_is_missing(tiny_opt: Path, text_file: Path, tmp_path: Path) -> None:
    """With the mask of one run and its bias, the mean output error over the calibration tokens is zero: measured here
    through the squared error, which a bias lowers by exactly its energy."""
    masked = flapped(tiny_opt, tmp_path / "masked", text_file, solver="mask-only", sparsity=0.3)
    biased = flapped(tiny_opt, tmp_path / "biased", text_file, sparsity=0.3)
    # The first block sees the same input in both runs.
    assert biased.blocks[0].error_mask_only == pytest.approx(masked.blocks[0].error_mask_only or 0)
    assert (biased.blocks[0].error or 0) < (masked.blocks[0].error or 0)


def test_flap_needs_a_bias(source: Path, text_file: Path, tmp_path: Path) -> None:
    pruned(source, tmp_path / "mistral", text_file, scope="attention", sparsity=0.25, structure="uniform")
    with pytest.raises(UnsupportedError, match="has no bias in its mlp"):
        flapped(tmp_path / "mistral", tmp_path / "out", text_file, sparsity=0.3)


def flapped(source: Path, output: Path, text_file: Path, **changes: Any) -> PruneReport:
    settings: dict[str, Any] = {"method": "flap", "calibration": str(text_file), "num_samples": 8, "seq_len": SEQ_LEN}
    return structprune.prune(
        source, Recipe.build(**{**settings, "multiple_of": 1, "dtype": "float32", **changes}), output
    )
