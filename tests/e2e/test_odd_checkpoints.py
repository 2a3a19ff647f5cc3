"""Checkpoints as people have them: read as stock code reads them and what was found is said, or refused with advice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, OPTForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from structprune import Recipe, prune
from structprune.api import inspect, plan
from structprune.assess import EvaluationRequest, evaluate, evaluate_all
from structprune.errors import CheckpointError, UnsupportedError
from support.checkpoints import change, change_config, change_weights
from support.command_line import CommandLine
from support.models import COMMON, byte_tokenizer, opt_config, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@torch.no_grad()
def logits(directory: Path) -> Tensor:
    """The stock model's logits of some tokens, float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids_BS = torch.randint(1, 250, (2, 24), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids_BS).logits


def pruned(source: Path, output: Path, text_file: Path, **settings: Any) -> Any:
    defaults = {"method": "fasp", "sparsity": 0.5, "multiple_of": 8, "num_samples": 4, "seq_len": 32}
    return prune(source, Recipe(calibration=str(text_file), dtype="float32", **{**defaults, **settings}), output)


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantisation_is_none(value: Any, tmp_path: Path, text_file: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    wanted = logits(source)
    change_config(source, quantization_config=value)
    report = pruned(source, tmp_path / "out", text_file, sparsity=0.0)
    assert any("quantization_config" in note for note in report.notes)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, rtol=0, atol=1e-5)


def test_switches_of_what_a_call_returns_are_stock_code_s(
    tmp_path: Path, text_file: Path, command_line: CommandLine
) -> None:
    # Stock code loads it; asked for eager attention, as building the blocks does, it refuses the first one.
    source = save_tiny("llama", tmp_path / "source")
    wanted = logits(source)
    switches = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
    change_config(source, **switches)
    report = pruned(source, tmp_path / "out", text_file, sparsity=0.0)
    assert report.reload is not None
    assert report.reload.relative_difference < 1e-6
    assert any(note.startswith("return_dict: false in config.json is left out") for note in report.notes)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    # The last one makes stock code fail at its own model.
    assert written["output_attentions"]
    assert written["output_hidden_states"]
    assert "return_dict" not in written
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, rtol=0, atol=1e-5)
    for verb in (["eval", source, "--text", text_file, "--seq-len", 32], ["bench", source, "--prompt", 16]):
        code, _, err = command_line(*verb, "--json")
        assert code == 0, err


def test_a_quantisation_left_over_is_named(tmp_path: Path) -> None:
    left_over = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    source = change_config(save_tiny("llama", tmp_path / "source"), quantization_config=left_over)
    with pytest.raises(UnsupportedError, match=r"left over.*'bitsandbytes' beside weights in float32") as caught:
        inspect(source)
    assert "Remove quantization_config" in str(caught.value)


@pytest.mark.parametrize("entry", ["dtype", "torch_dtype"])
def test_an_automatic_dtype_is_that_of_the_weights(entry: str, tmp_path: Path, text_file: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps({**config, entry: "auto"}))
    report = pruned(source, tmp_path / "out", text_file)
    assert any("'auto'" in note for note in report.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())[entry] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    # Chats need the tokenizer, whose loader reads the entry too.
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": text_file.read_text()[:2000]}]}))
    for stream in (False, True):
        request = EvaluationRequest(texts=[text_file, chats], seq_len=32, max_windows=2, stream=stream)
        assert all(text.perplexity > 1 for text in evaluate_all(source, request).texts)


# Name -> (file, its entry, what stock code says of it).
REFUSED_SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention that is not installed": (
        "config.json",
        {"attn_implementation": "flash_attention_2"},
        "FlashAttention2",
    ),
    "generation": ("generation_config.json", {"max_new_tokens": -5}, "max_new_tokens"),
}


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_settings_that_stock_code_refuses_are_found_first(name: str, tmp_path: Path, text_file: Path) -> None:
    """They are copied into the result, which would not load; neither does the source."""
    file, entries, said = REFUSED_SETTINGS[name]
    source = save_tiny("llama", tmp_path / "source")
    change(source / file, **entries)
    with pytest.raises((ImportError, ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(source)
    asked = Recipe(method="fasp", calibration=str(text_file), num_samples=4, seq_len=32)
    with pytest.raises(CheckpointError, match=said) as caught:
        plan(source, asked)
    assert caught.value.where == str(source / file)


def test_a_tied_head_that_is_stored_too_counts_once(tmp_path: Path, text_file: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    dense = inspect(source)
    change_weights(source, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()})
    layout = inspect(source)
    assert (layout.num_parameters, layout.tied_embeddings) == (dense.num_parameters, True)
    report = pruned(source, tmp_path / "out", text_file)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report.size.parameters_after == sum(p.numel() for p in stock.parameters())
    assert "lm_head.weight" not in weights(tmp_path / "out")


def test_a_tied_embedding_that_is_stored_as_the_head(tmp_path: Path, text_file: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    wanted = logits(source)
    change_weights(source, lambda w: {"lm_head.weight": w.pop("model.embed_tokens.weight"), **w})
    torch.testing.assert_close(logits(source), wanted)
    assert inspect(source).tied_embeddings
    pruned(source, tmp_path / "out", text_file, sparsity=0.0)
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, rtol=0, atol=1e-5)


def test_a_tied_head_that_differs_is_kept_and_untied(tmp_path: Path, text_file: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    change_weights(source, lambda w: {**w, "lm_head.weight": 2 * w["model.embed_tokens.weight"]})
    wanted = logits(source)
    report = pruned(source, tmp_path / "out", text_file, sparsity=0.0)
    assert any("untied" in note for note in report.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, rtol=0, atol=1e-5)


def test_experts_that_are_stored_stacked(tmp_path: Path, text_file: Path) -> None:
    """The output is that of the same model with a tensor for each map of each expert."""
    sizes = {**COMMON, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, norm_topk_prob=True)).eval()
    for name, options in {"apart": {}, "stacked": {"save_original_format": False}}.items():
        model.save_pretrained(tmp_path / name, **options)
        byte_tokenizer().save_pretrained(tmp_path / name)
    assert any(name.endswith("gate_up_proj") for name in load_file(tmp_path / "stacked" / "model.safetensors"))
    apart, stacked = inspect(tmp_path / "apart"), inspect(tmp_path / "stacked")
    assert stacked.blocks == apart.blocks
    outputs = [tmp_path / f"{name}-out" for name in ("apart", "stacked")]
    for name, output in zip(("apart", "stacked"), outputs, strict=True):
        pruned(tmp_path / name, output, text_file, num_samples=16)
    expected, found = map(weights, outputs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_index_that_omits_and_invents(tmp_path: Path, text_file: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", max_shard_size="20KB")
    wanted = logits(source)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    omitted = "model.layers.0.mlp.up_proj.weight"
    index["weight_map"]["model.layers.7.nothing"] = index["weight_map"].pop(omitted)
    path.write_text(json.dumps(index))
    torch.testing.assert_close(logits(source), wanted)
    report = pruned(source, tmp_path / "out", text_file, sparsity=0.0)
    assert [note for note in report.notes if omitted in note]
    assert [note for note in report.notes if "model.layers.7.nothing" in note]
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, rtol=0, atol=1e-5)


def test_shards_without_an_index(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "training_args.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no index.*model-00001-of-00001\.safetensors") as caught:
        inspect(source)
    assert "Rename the file to model.safetensors" in str(caught.value)


def test_a_part_of_a_split_checkpoint(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", max_shard_size="20KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    kept = sorted(set(index["weight_map"].values()))[:1]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file in kept}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"[Ff]etch all \d+ files and model\.safetensors\.index\.json"):
        inspect(source)


NAMES: dict[str, tuple[Callable[[str], str], str]] = {
    "compiled": (lambda name: f"_orig_mod.{name}", "torch.compile wrapped"),
    "data parallel": (lambda name: f"module.{name}", "DistributedDataParallel wrapped"),
    "sharded": (lambda name: name.replace("model.layers.0.", "model.layers.0._fsdp_wrapped_module."), "FSDP wrapped"),
    "adapter": (lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"), "adapter that is not merged"),
    "value head": (lambda name: name.replace("model.norm.weight", "v_head.summary.weight"), "value head"),
    "wrapper": (lambda name: f"language_model.{name}", "wrapper around a text model"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_another_program_left(case: str, tmp_path: Path, text_file: Path) -> None:
    renamed, what = NAMES[case]
    source = save_tiny("llama", tmp_path / "source")
    change_weights(source, lambda w: {renamed(name): tensor for name, tensor in w.items()})
    with pytest.raises(CheckpointError, match=f"names of a .*{what}|names of {what}") as caught:
        inspect(source)
    assert "ownload" not in str(caught.value)
    # Stock code would draw what is missing at random, and measure that.
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensor\(s\), which stock transformers would draw at random"):
        evaluate(source, text_file, seq_len=32, max_windows=1)


def test_a_model_with_ears_says_where_its_text_model_is(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    (source / "config.json").write_text(
        json.dumps({"model_type": "qwen2_audio", "architectures": ["Qwen2AudioForConditionalGeneration"]})
    )
    with pytest.raises(UnsupportedError, match="qwen2_audio wraps a text model") as caught:
        inspect(source)
    assert "Save the text model that it wraps" in str(caught.value)


@pytest.mark.parametrize("method", ["magnitude", "structprune"])
def test_a_model_without_final_norm(method: str, tmp_path: Path, text_file: Path) -> None:
    torch.manual_seed(0)
    model = OPTForCausalLM(opt_config(_remove_final_layer_norm=True)).eval()
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    report = pruned(tmp_path / "source", tmp_path / "out", text_file, method=method, sparsity=0.0)
    assert report.calibration.pruned_perplexity == pytest.approx(report.calibration.dense_perplexity, rel=1e-4)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "source"), rtol=0, atol=1e-4)


def with_extra_tokens(directory: Path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<|extra{number}|>" for number in range(8)])
    tokenizer.save_pretrained(directory)
    return directory


def test_a_token_beyond_the_embedding(tmp_path: Path, command_line: CommandLine) -> None:
    source = with_extra_tokens(save_tiny("llama", tmp_path / "source"))
    text = tmp_path / "text.txt"
    text.write_text("the cat <|extra7|> sat on the mat " * 400)
    common = ("--seq-len", 32)
    for command in (
        ("prune", source, "-o", tmp_path / "out", "--calibration", text, "--num-samples", 4, *common),
        ("eval", source, "--text", text, *common),
        ("eval", source, "--text", text, "--stream", *common),
    ):
        code, _, err = command_line(*command)
        assert code == 2
        assert "no row for; got token 264 ('<|extra7|>'), wanted tokens below 260" in " ".join(err.split())
    assert not (tmp_path / "out.partial").exists()
    # A text without that token is read as before.
    text.write_text("the cat sat on the mat " * 400)
    assert evaluate(source, text, seq_len=32).perplexity > 1


TOKENIZERS: dict[str, Any] = {
    "unigram": lambda: models.Unigram([(c, -1.0) for c in "abcdefghijklmnopqrstuvwxy "], None, False),
    "words": lambda: models.WordLevel({"the": 0, "cat": 1}, unk_token="[UNK]"),
    "pairs": lambda: models.BPE({"a": 0, "b": 1}, [], unk_token="<unk>"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_that_cannot_encode(kind: str, tmp_path: Path, text_file: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()
    tokenizer = Tokenizer(TOKENIZERS[kind]())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace() if kind == "words" else pre_tokenizers.Punctuation()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError, match="the tokenizer cannot encode the text"):
        pruned(source, tmp_path / "out", text_file)
    assert not (tmp_path / "out.partial").exists()


def test_negative_padding_is_no_token(tmp_path: Path, text_file: Path) -> None:
    """LLaMA 1 checkpoints have pad_token_id -1."""
    source = change_config(save_tiny("llama", tmp_path / "source"), pad_token_id=-1)
    report = pruned(source, tmp_path / "out", text_file, sparsity=0.0)
    assert report.reload.relative_difference is not None
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=0, atol=1e-5)
