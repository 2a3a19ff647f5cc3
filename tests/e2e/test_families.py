"""Every family through every kind of run: what the run measured on its streams is what the reloaded output computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import structprune
from structprune.api import evaluate
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.model import StockModel
from structprune.architectures.stock.sampler import growing_cache
from structprune.calibration.context import consecutive_windows
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import UnsupportedError
from structprune.recipe import Recipe
from structprune.results.report import PruneReport
from support.models import TINY_MODELS, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

NUM_SAMPLES, SEQ_LEN = 8, 32
KINDS = [kind for kind in TINY_MODELS if not kind.startswith(("llama", "opt"))]
MIXTURES = ("qwen3_moe",)
# Gate and up are no maps of their own, or there are many of them.
FUSED_MLP = ("phi3", "phi3-longrope", *MIXTURES)
# Stock classes derive the size of a head from the hidden size.
FIXED_HEADS = ("gpt2", "gpt2-default-width", "gpt_neox", "gpt_neox-sequential")


# The same stock classes with other settings, which a run with the default method and the conformance tests go through.
VARIANTS = ("gemma3_text-biased", "gpt2-default-width", "gpt_neox-sequential", "phi3-longrope", "qwen3-biased-windowed")
ONE_OF_A_FAMILY = [pytest.param(kind, marks=pytest.mark.slow if kind in VARIANTS else ()) for kind in KINDS]
once_per_family = pytest.mark.parametrize("source", ONE_OF_A_FAMILY, indirect=True)


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("families") / request.param, num_blocks=3)


def multiple(source: Path) -> int:
    """The smallest step of widths that stock kernels take."""
    return 8 if source.name in MIXTURES else 1


def run(source: Path, output: Path, text_file: Path, **changes: Any) -> PruneReport:
    settings: dict[str, Any] = {
        "method": "fasp",
        "sparsity": 0.3,
        "calibration": str(text_file),
        "num_samples": NUM_SAMPLES,
    }
    settings |= {"multiple_of": multiple(source), "seq_len": SEQ_LEN, "dtype": "float32", "device": "cpu", **changes}
    return structprune.prune(source, Recipe.build(**settings), output)


def perplexity(model: Any, directory: Path, text_file: Path, num_windows: int) -> float:
    """Of the windows that a run draws, through the whole model."""
    windows_NS = consecutive_windows(TextEncoder(directory).encode(text_file.read_text()), SEQ_LEN, "text", "test")
    order = torch.randperm(len(windows_NS), generator=torch.Generator().manual_seed(0))
    ids_NS = windows_NS[order[:NUM_SAMPLES]][:num_windows]
    with torch.no_grad():
        logits_TV = model(input_ids=ids_NS).logits[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits_TV, ids_NS[:, 1:].flatten()).exp())


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def scope_of(source: Path) -> str:
    return "mlp" if source.name in FIXED_HEADS else "all"


def check(report: PruneReport, source: Path, output: Path, text_file: Path, sparsity: float = 0.3) -> Any:
    """The reloaded model's perplexity is the reported one, and so is the dense one's; returns the model."""
    windows = report.calibration.perplexity_windows
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    expected = perplexity(dense, source, text_file, windows)
    assert report.calibration.dense_perplexity == pytest.approx(expected, rel=1e-4)
    model = load_model(output, torch.device("cpu"), torch.float32)
    assert report.calibration.pruned_perplexity == pytest.approx(
        perplexity(model, output, text_file, windows), rel=1e-4
    )
    ids_BS = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids_BS).logits, dense(input_ids=ids_BS).logits, atol=0.05)
    assert report.size.removed_share_of_scope >= sparsity
    assert report.size.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes
    return model


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(kind, target, marks=pytest.mark.slow if kind in VARIANTS and target == "local" else ())
        for kind in KINDS
        for target in ("dense-path", "local")
    ],
    indirect=["source"],
)
def test_structprune(target: str, source: Path, text_file: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "structprune", "scope": scope_of(source)}
    if source.name in MIXTURES and target == "dense-path":
        with pytest.raises(UnsupportedError, match="experts share what they add to the stream"):
            run(source, tmp_path / "out", text_file, target=target, **settings)
        # Without a wish the target is the one that there is.
        report = run(source, tmp_path / "out", text_file, **settings)
        assert report.recipe.target == "local"
    else:
        report = run(source, tmp_path / "out", text_file, target=target, **settings)
    check(report, source, tmp_path / "out", text_file)
    assert all(block.error < 1 for block in report.blocks if block.error is not None)


def test_uniform_needs_no_code(source: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    check(run(source, output, text_file, method="fasp"), source, output, text_file)
    assert not list(output.glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert type(loaded) is type(AutoModelForCausalLM.from_pretrained(source))


@once_per_family
def test_taylor(source: Path, text_file: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "llm-pruner", "scope": scope_of(source), "structure": "per-layer"}
    report = run(source, tmp_path / "out", text_file, **settings)
    check(report, source, tmp_path / "out", text_file)


@once_per_family
def test_whole_blocks(source: Path, text_file: Path, tmp_path: Path) -> None:
    check(
        run(source, tmp_path / "out", text_file, method="depth", multiple_of=None), source, tmp_path / "out", text_file
    )


def test_uniform_heads(source: Path, text_file: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "wanda-sp", "scope": "attention", "sparsity": 0.4, "structure": "uniform"}
    if source.name in (*FIXED_HEADS, "phi3-longrope"):
        with pytest.raises(UnsupportedError, match=r"cannot express fewer attention units|factors for long texts"):
            run(source, tmp_path / "out", text_file, **settings)
        return
    check(run(source, tmp_path / "out", text_file, **settings), source, tmp_path / "out", text_file, 0.4)
    heads = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (heads["num_attention_heads"], heads["num_key_value_heads"]) == (2, 1)
    assert not list((tmp_path / "out").glob("*.py"))


@once_per_family
def test_nothing_removed_is_the_source(source: Path, text_file: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", text_file, method="structprune", structure="uniform", sparsity=0.0)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@once_per_family
def test_pruned_again(source: Path, text_file: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "once", text_file, method="structprune", scope=scope_of(source))
    report = run(tmp_path / "once", tmp_path / "twice", text_file, method="fasp", multiple_of=multiple(source))
    first = StockModel(CheckpointReader(tmp_path / "once")).layout
    second = StockModel(CheckpointReader(tmp_path / "twice")).layout
    assert report.size.parameters_before == first.num_parameters
    for before, after in zip(first.blocks, second.blocks, strict=True):
        assert after.group("mlp").num_units < before.group("mlp").num_units
        assert after.group("attention") == before.group("attention")


@once_per_family
def test_bfloat16_stays_bfloat16(source: Path, text_file: Path, tmp_path: Path) -> None:
    half = save_tiny(source.name, tmp_path / "half" / source.name, dtype=torch.bfloat16)
    run(half, tmp_path / "out", text_file, method="structprune", scope=scope_of(source), dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


@once_per_family
@pytest.mark.parametrize("solver", ["admm", "alternating"])
def test_solvers_that_move_the_producers(solver: str, source: Path, text_file: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "method": "structprune",
        "solver": solver,
        "target": "local",
        "multiple_of": multiple(source),
    }
    if source.name in FUSED_MLP or source.name.startswith("gemma"):
        with pytest.raises(UnsupportedError, match=r"moves up and gate as maps of their own|norms what the MLP adds"):
            run(source, tmp_path / "out", text_file, **settings)
        return
    report = run(source, tmp_path / "out", text_file, **settings)
    check(report, source, tmp_path / "out", text_file)
    assert all(f"{solver}_accepted" in block.statistics for block in report.blocks)


def test_evaluation_is_the_stock_models(source: Path, text_file: Path) -> None:
    result = evaluate(source, text_file, seq_len=SEQ_LEN, max_windows=4, dtype="float32", device="cpu")
    ids_NS = consecutive_windows(TextEncoder(source).encode(text_file.read_text()), SEQ_LEN, "text", "test")[:4]
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        loss = model(input_ids=ids_NS, labels=ids_NS).loss
    assert result.mean_nll == pytest.approx(float(loss), rel=1e-5)


@torch.no_grad()
def test_sampling_decodes_what_a_forward_pass_computes(source: Path) -> None:
    """Also with windows: the cache that the sampler grows keeps all tokens, and the mask leaves out the old ones."""
    length = 14  # longer than the windows, and shorter than what turns on factors for long texts
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    ids_BS = torch.randint(0, 250, (2, length), generator=torch.Generator().manual_seed(4))
    cache = growing_cache(model.config.num_hidden_layers, length)
    steps = [model(input_ids=ids_BS[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(length)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(input_ids=ids_BS).logits, rtol=1e-4, atol=1e-4)


# What stock classes give biases to, or can be told to.
BIASED = {"mlp": ("gpt2", "gpt_neox"), "attention": ("qwen3",)}


@pytest.mark.parametrize("scope", ["mlp", "attention"])
def test_mean_of_what_is_removed_as_a_bias(scope: str, source: Path, text_file: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "flap", "scope": scope, "sparsity": 0.4}
    if scope == "attention" and source.name in FIXED_HEADS:
        with pytest.raises(UnsupportedError, match="cannot express fewer attention units"):
            run(source, tmp_path / "out", text_file, **settings)
    elif not source.name.startswith(BIASED[scope]):
        with pytest.raises(UnsupportedError, match=f"the stock class has no bias in its {scope}|adds one constant"):
            run(source, tmp_path / "out", text_file, **settings)
    else:
        report = run(source, tmp_path / "out", text_file, **settings)
        check(report, source, tmp_path / "out", text_file, 0.4)


@pytest.mark.parametrize("changes", [{"multiple_of": 4}, {"multiple_of": 12}])
def test_widths_that_stock_kernels_do_not_take(changes: dict[str, Any], text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "qwen3_moe")
    with pytest.raises(UnsupportedError, match="stock kernels for qwen3_moe take other widths only"):
        run(source, tmp_path / "out", text_file, method="fasp", **changes)


def test_every_expert_has_its_own_choice(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "qwen3_moe")
    report = run(source, tmp_path / "out", text_file, method="fasp")
    kept = json.loads((tmp_path / "out" / "pruning_manifest.json").read_text())["kept_indices"]
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys(), "one tensor for each map of each expert, as in the source"
    for block in report.blocks:
        choices = kept[str(block.block)]
        assert list(choices) == [f"mlp.{number}" for number in range(4)]
        assert len({tuple(units) for units in choices.values()}) > 1
        assert {len(units) for units in choices.values()} == {block.kept_units} == {32}
        assert block.statistics["parts"] == 4
        for number, units in enumerate(choices.values()):
            name = f"model.layers.{block.block}.mlp.experts.{number}.up_proj.weight"
            assert torch.equal(after[name], before[name][units])
    router = "model.layers.0.mlp.gate.weight"
    assert torch.equal(after[router], before[router])


def test_experts_without_tokens_keep_their_weights(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    # Equal shares for all: every token goes to the same two.
    tensors["model.layers.0.mlp.gate.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = run(source, tmp_path / "out", text_file, method="fasp")
    assert [block.statistics["experts_without_tokens"] for block in report.blocks] == [2, 0]
    kept = json.loads((tmp_path / "out" / "pruning_manifest.json").read_text())["kept_indices"]["0"]
    after = load_file(tmp_path / "out" / "model.safetensors")
    names = [f"model.layers.0.mlp.experts.{number}.down_proj.weight" for number in range(4)]
    same = [torch.equal(after[name], tensors[name][:, kept[f"mlp.{i}"]]) for i, name in enumerate(names)]
    assert sum(same) == 2


def test_a_model_saved_without_its_head(text_file: Path, tmp_path: Path) -> None:
    """As the first GPT-2s are: names without the base model's, and the causal masks as buffers."""
    source = save_tiny("gpt2", tmp_path / "gpt2")
    AutoModelForCausalLM.from_pretrained(source).transformer.save_pretrained(source)
    bare = load_file(source / "model.safetensors")
    assert "h.0.attn.c_attn.weight" in bare
    masks = {"h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    save_file(bare | masks, source / "model.safetensors", metadata={"format": "pt"})
    for structure in ("uniform", "per-layer"):
        output = tmp_path / structure
        check(
            run(
                source,
                output,
                text_file,
                method="fasp",
                structure=structure,
                sparsity=0.6,
                multiple_of=multiple(source),
            ),
            source,
            output,
            text_file,
        )
        # transformers translates names for its own classes only.
        expected = bare if structure == "uniform" else {f"transformer.{name}" for name in bare}
        assert set(tensors_of(output)) == set(expected)
