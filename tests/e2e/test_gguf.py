"""GGUF files: a stock llama.cpp loads each and gives the log-probabilities that transformers gives the checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from structprune import Recipe, prune
from structprune.api import export
from structprune.architectures.gguf.table import GGUF_FAMILIES
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.model import StockModel
from structprune.cli import main
from structprune.engine.planning.gguf_bytes import GgufBytes
from structprune.errors import CheckpointError, InputError, NumericalError, StructPruneError, UnsupportedError
from support.gguf_models import SIZES, VOCAB, rope
from support.llama_runtime import run_llama

pytestmark = pytest.mark.usefixtures("one_thread")

# llama.cpp's table of GELU has half precision; SiLU is computed.
GELU = ("gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "gpt_neox-sequential")
PROMPTS = [
    torch.randint(1, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (5, 70)
]


def bpe(pre: Any, *, ignore_merges: bool = False, merges: bool = True, **changes: Any) -> PreTrainedTokenizerFast:
    """Every byte, a few merges, a start token that is special and a word that is not; fewer tokens than VOCAB."""
    vocab = {token: index for index, token in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    pairs = [
        ("Ġ", "a"),
        ("a", "b"),
        ("Ġa", "b"),
        ("1", "2"),
        ("12", "3"),
        ("Ġ", "Ġ"),
        ("'", "s"),
        ("b", "a"),
        ("A", "B"),
    ]
    pairs = pairs if merges else []
    for first, second in pairs:
        vocab[first + second] = len(vocab)
    if ignore_merges:
        vocab["xyz"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.add_tokens(["hello"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def gpt2_pre() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


NEOX = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"} | rope(
    "default", partial_rotary_factor=0.5
)
# Name -> (config, architecture of the file).
UNIFORM: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (lambda: LlamaConfig(**SIZES), "llama"),
    "llama-tied-biased": (
        lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        "llama",
    ),
    "llama-llama3": (lambda: LlamaConfig(**SIZES, **rope("llama3", **LLAMA3)), "llama"),
    "llama-linear": (lambda: LlamaConfig(**SIZES, **rope("linear", factor=4.0)), "llama"),
    "llama-yarn": (
        lambda: LlamaConfig(**SIZES, **rope("yarn", factor=4.0, original_max_position_embeddings=64)),
        "llama",
    ),
    # What a LLaMA with pruned heads becomes: heads times head size is not the hidden size.
    "mistral": (lambda: MistralConfig(**SIZES | {"num_attention_heads": 6}, head_dim=16, sliding_window=None), "llama"),
    "qwen2": (lambda: Qwen2Config(**SIZES), "qwen2"),
    # llama.cpp's qwen2 takes queries as wide as the hidden size only.
    "qwen2-fewer-heads": (lambda: Qwen2Config(**SIZES | {"num_attention_heads": 2}, head_dim=16), "deci"),
    "qwen3": (lambda: Qwen3Config(**SIZES, head_dim=32), "qwen3"),
    "gemma": (lambda: GemmaConfig(**SIZES, head_dim=16), "gemma"),
    "gemma2": (
        lambda: Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
        "gemma2",
    ),
    "gemma3": (
        lambda: Gemma3TextConfig(
            **SIZES | {"num_hidden_layers": 7}, head_dim=16, query_pre_attn_scalar=16, sliding_window=8
        ),
        "gemma3",
    ),
    "phi3": (lambda: Phi3Config(**SIZES), "phi3"),
    "gpt2": (
        lambda: GPT2Config(
            n_embd=64,
            n_layer=3,
            n_head=4,
            n_positions=256,
            vocab_size=VOCAB,
            n_inner=80,
            bos_token_id=0,
            eos_token_id=0,
        ),
        "gpt2",
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeConfig(
            **SIZES, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
        ),
        "qwen3moe",
    ),
    "gpt_neox": (lambda: GPTNeoXConfig(**NEOX), "gptneox"),
    "gpt_neox-sequential": (lambda: GPTNeoXConfig(**NEOX, use_parallel_residual=False), "gptneox"),
}


def randomised(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    fill(model, shifted=config.model_type.startswith(("gemma", "nemotron", "qwen3_next", "qwen3_5")))
    return model


@torch.no_grad()
def fill(model: Any, *, shifted: bool = False) -> None:
    """Weights by which the log-probabilities of the vocabulary span about seven."""
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            parameter.normal_(std=0.15)
        elif name.endswith("bias") or shifted:
            parameter.uniform_(-0.3, 0.3)
        else:
            parameter.uniform_(0.5, 1.5)
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        # By which a mixture chooses.
        if name in saved and buffer.is_floating_point():
            buffer.normal_(std=0.15)


def stock_checkpoint(config: Any, directory: Path, **tokenizer: Any) -> tuple[Path, Any]:
    model = randomised(config)
    model.save_pretrained(directory)
    bpe(gpt2_pre(), **tokenizer).save_pretrained(directory)
    return directory, model


@torch.no_grad()
def logprobs(model: Any, prompts: list[list[int]] = PROMPTS) -> Tensor:
    """Of the token after each prompt, (prompts, V)."""
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1) for ids in prompts])


def assert_same(path: Path, model: Any, *, atol: float = 1e-4) -> None:
    expected_NV = logprobs(model)
    answers = run_llama(path, PROMPTS, VOCAB)
    torch.testing.assert_close(answers.logprobs_NV, expected_NV, rtol=0, atol=atol)
    assert torch.equal(answers.logprobs_NV.topk(5).indices, expected_NV.topk(5).indices)


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_widths_load_as_the_native_architecture(name: str, tmp_path: Path) -> None:
    config, architecture = UNIFORM[name]
    source, model = stock_checkpoint(config(), tmp_path / "model")
    result = export(source, tmp_path / "tiny.gguf", dtype="float32")
    assert (result.architecture, result.dtype) == (architecture, "float32")
    assert_same(tmp_path / "tiny.gguf", model, atol=5e-3 if name in GELU else 1e-4)
    stock = StockModel(open_model(str(source)))
    counted = GgufBytes(stock, "f32", blocks_go=False).total(stock.layout.blocks, [])
    # What is counted high are names, and entries beside the tokenizer.
    assert result.bytes <= counted < result.bytes + 9000


def test_a_limit_of_bytes_of_the_gguf_file(tmp_path: Path) -> None:
    source, _ = stock_checkpoint(UNIFORM["llama"][0](), tmp_path / "model")
    most = export(source, tmp_path / "whole.gguf", dtype="bfloat16").bytes - 1000
    text = tmp_path / "text.txt"
    text.write_text("hello there " * 400, encoding="utf-8")
    recipe = {"method": "structprune", "multiple_of": 1, "num_samples": 4, "seq_len": 32, "calibration": str(text)}
    report = prune(source, Recipe.build(**recipe, target_bytes=f"bf16:{most}"), tmp_path / "out")
    (limit,) = report.limits
    written = export(tmp_path / "out", tmp_path / "out.gguf", dtype="bfloat16").bytes
    assert written <= limit.predicted <= most < limit.before
    assert limit.reached is None
    assert limit.name == "bytes of a BF16 GGUF file"
    assert "llama-quantize" in limit.line


@pytest.mark.parametrize(("name", "old", "new"), [("gpt2", "", "transformer."), ("gpt_neox", "lm_head.", "embed_out.")])
def test_other_names_of_tensors(name: str, old: str, new: str, tmp_path: Path) -> None:
    source, model = stock_checkpoint(UNIFORM[name][0](), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    renamed = {old + n.removeprefix(new) if n.startswith(new) else n: tensor for n, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    # What old ones hold beside their weights.
    if name == "gpt2":
        renamed["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    export(source, tmp_path / "tiny.gguf")
    assert_same(tmp_path / "tiny.gguf", model, atol=5e-3)


def test_every_uneven_target_is_loaded_by_a_test() -> None:
    assert {name for name, family in GGUF_FAMILIES.items() if family.uneven} == set(UNEVEN)


WIDTHS = [
    {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64},
    {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96},
    {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 33},
    {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 50},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
]
BROAD = SIZES | {"num_hidden_layers": len(WIDTHS), "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
UNEVEN: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**BROAD, attention_bias=True, mlp_bias=True, **rope("llama3", **LLAMA3)),
    "mistral": lambda: MistralConfig(**BROAD, sliding_window=None, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**BROAD),
    "qwen3": lambda: Qwen3Config(**BROAD, tie_word_embeddings=True),
}
REMOVED: dict[str, dict[str, list[str]]] = {
    "nothing": {},
    # The first block's attention, the last block's MLP, one of either between.
    "sublayers": {"0": ["attention"], "1": ["mlp"], "2": ["attention"], "4": ["mlp"]},
    "blocks": {"0": ["attention", "mlp"], "2": ["mlp"], "3": ["attention"], "4": ["attention", "mlp"]},
}
HALVES = {
    "attention": ("self_attn.", "input_layernorm.", "self_attn.o_proj"),
    "mlp": ("mlp.", "post_attention_layernorm.", "mlp.down_proj"),
}


def uneven_checkpoint(config: Any, directory: Path, removed: Mapping[str, list[str]]) -> tuple[Path, Any]:
    """Stock layers of different widths; a removed sublayer adds nothing in the model and is not in the files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for index, changes in enumerate(WIDTHS):
        own = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(own, name, value)
        model.model.layers[index] = type(model.model.layers[index])(own, index).eval()
    fill(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for index, kinds in removed.items():
        for kind in kinds:
            *prefixes, consumer = HALVES[kind]
            for parameter in model.model.layers[int(index)].get_submodule(consumer).parameters():
                parameter.data.zero_()
            gone = tuple(f"model.layers.{index}.{prefix}" for prefix in prefixes)
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    entries = {"per_layer_config": {str(i): fields for i, fields in enumerate(WIDTHS)}, "structprune_removed": removed}
    (directory / "config.json").write_text(json.dumps({**config.to_dict(), **entries}), encoding="utf-8")
    bpe(gpt2_pre()).save_pretrained(directory)
    return directory, model


@pytest.mark.parametrize("removed", REMOVED)
@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_widths_load_as_an_architecture_with_lists(name: str, removed: str, tmp_path: Path) -> None:
    source, model = uneven_checkpoint(UNEVEN[name](), tmp_path / "model", REMOVED[removed])
    result = export(source, tmp_path / "tiny.gguf")
    assert result.architecture == ("openelm" if name == "qwen3" else "deci")
    assert_same(tmp_path / "tiny.gguf", model)


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 0.03), ("bfloat16", 0.2)])
def test_half_precision(dtype: str, atol: float, tmp_path: Path) -> None:
    source, model = uneven_checkpoint(UNEVEN["llama"](), tmp_path / "model", {})
    wide = export(source, tmp_path / "wide.gguf")
    narrow = export(source, tmp_path / "narrow.gguf", dtype=dtype)
    assert narrow.dtype == dtype
    assert narrow.bytes < 0.6 * wide.bytes
    answers = run_llama(tmp_path / "narrow.gguf", PROMPTS, VOCAB)
    torch.testing.assert_close(answers.logprobs_NV, logprobs(model), rtol=0, atol=atol)


def test_stored_dtype_is_the_default(tmp_path: Path) -> None:
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    assert export(source, tmp_path / "a.gguf").dtype == "bfloat16"
    # Two dtypes: float32 holds both.
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].float()
    save_file(tensors, source / "model.safetensors")
    assert export(source, tmp_path / "b.gguf").dtype == "float32"


def pruned(source: Path, text_file: Path, output: Path, **settings: Any) -> Path:
    recipe = {
        "method": "fasp",
        "calibration": str(text_file),
        "num_samples": 4,
        "seq_len": 32,
        "dtype": "float32",
        "multiple_of": 1,
    }
    prune(source, Recipe.build(**recipe | settings), output)
    return output


@pytest.mark.parametrize(
    ("settings", "architecture"),
    [
        ({"method": "structprune", "scope": "all", "sparsity": 0.5, "allow_block_removal": True}, "deci"),
        # Biases where widths differ, as a repair adds them too.
        ({"method": "flap", "scope": "all", "sparsity": 0.3}, "deci"),
        # Biases, and heads by which the output is of type Mistral.
        ({"method": "flap", "sparsity": 0.3, "structure": "uniform"}, "llama"),
        ({"method": "wanda-sp", "scope": "attention", "head_units": "query-head", "sparsity": 0.3}, "llama"),
        ({"method": "slicegpt", "structure": "uniform", "sparsity": 0.1, "multiple_of": 4}, "llama"),
        ({"method": "depth", "sparsity": 0.3}, "llama"),
    ],
    ids=lambda value: value.get("method") if isinstance(value, dict) else value,
)
@pytest.mark.usefixtures("modules_cache")
def test_a_pruned_model(settings: dict[str, Any], architecture: str, text_file: Path, tmp_path: Path) -> None:
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    output = pruned(source, text_file, tmp_path / "out", **settings)
    assert export(output, tmp_path / "out.gguf").architecture == architecture
    assert_same(tmp_path / "out.gguf", load_model(output, torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_zeros_of_single_weights_stay(dtype: str, text_file: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    recipe = Recipe(method="magnitude", pattern="2:4", calibration=str(text_file), num_samples=2, seq_len=32)
    report = prune(source, recipe.model_copy(update={"reload_check": False}), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "out.gguf", dtype=dtype)
    matrices = [
        t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name.startswith("blk.") and len(t.shape) > 1
    ]
    zeros = sum(int((gguf.dequantize(t.data, t.tensor_type) == 0).sum()) for t in matrices)
    assert report.zeros is not None
    assert zeros == report.zeros.zeros > 0


def test_a_window_caps_the_context(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source, model = stock_checkpoint(MistralConfig(**SIZES, sliding_window=100), tmp_path / "model")
    export(source, tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert reader.get_field("llama.context_length").contents() == 100
    assert_same(tmp_path / "tiny.gguf", model)


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE: dict[str, tuple[Callable[[], Any], bool]] = {
    "gpt-2": (gpt2_pre, False),
    "smollm": (lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_pre()]), False),
    "qwen2": (lambda: split(rf"{WORDS}|\p{{N}}|{REST}"), False),
    "llama-bpe": (lambda: split(rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"), True),
    "dbrx": (lambda: split(rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"), False),
}
TEXTS = [
    "ab 123 1234 ab12 ab",
    "it's AB'S  ab,  \n\n ab\t x_y  ",
    "xyz wxyz hello hellohello <s> é ü 你好 🙂 ab",
]


@pytest.mark.parametrize("name", PRE)
def test_the_tokenizer_cuts_text_as_the_checkpoints_does(name: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    pre, ignore_merges = PRE[name]
    bpe(pre(), ignore_merges=ignore_merges, normalizer=normalizers.NFC()).save_pretrained(source)
    (source / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    export(source, tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert reader.get_field("tokenizer.ggml.pre").contents() == name
    assert reader.get_field("tokenizer.chat_template").contents() == "{{ messages }}"
    assert reader.get_field("tokenizer.ggml.bos_token_id").contents() == 0
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is False
    assert reader.get_field("tokenizer.ggml.tokens").contents()[-1] == f"[PAD{VOCAB - 1}]"
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [text.replace("<s>", "") for text in TEXTS]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert run_llama(tmp_path / "tiny.gguf", PROMPTS[:1], VOCAB, texts=texts).tokens == expected


def test_the_tokenizer_of_another_gguf_is_copied(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source, model = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    export(source, tmp_path / "dense.gguf")
    (source / "tokenizer.json").unlink()
    result = export(source, tmp_path / "copied.gguf", tokenizer_gguf=tmp_path / "dense.gguf")
    assert result.tokenizer == str(tmp_path / "dense.gguf")
    fields = [gguf.GGUFReader(tmp_path / name).fields for name in ("dense.gguf", "copied.gguf")]
    names = [[name for name in part if name.startswith("tokenizer.")] for part in fields]
    assert names[0] == names[1]
    for name in names[0]:
        assert fields[0][name].contents() == fields[1][name].contents(), name
        assert fields[0][name].types == fields[1][name].types, name
    assert_same(tmp_path / "copied.gguf", model)


def test_a_model_from_a_gguf_keeps_its_tokenizer(text_file: Path, tmp_path: Path) -> None:
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    # transformers reads this pre-tokenizer from a GGUF as another one.
    bpe(PRE["smollm"][0]()).save_pretrained(source)
    export(source, tmp_path / "dense.gguf")
    output = pruned(tmp_path / "dense.gguf", text_file, tmp_path / "out")
    result = export(output, tmp_path / "small.gguf")
    assert result.tokenizer == str(tmp_path / "dense.gguf")
    (tmp_path / "dense.gguf").rename(tmp_path / "first.gguf")
    # Without the file there is tokenizer.json, which was made of it.
    assert export(output, tmp_path / "again.gguf").tokenizer == str(output / "tokenizer.json")
    names = ("first", "small", "again")
    tokens = [run_llama(tmp_path / f"{name}.gguf", PROMPTS[:1], VOCAB, texts=TEXTS).tokens for name in names]
    assert tokens[0] == tokens[1] == tokens[2]


def damaged(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    return apply


def configured(**changes: Any) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return apply


def tokenized(**options: Any) -> Callable[[Path], None]:
    return lambda source: bpe(options.pop("pre", gpt2_pre)(), **options).save_pretrained(source)


UP = "model.layers.1.mlp.up_proj.weight"
BAD: dict[str, tuple[Callable[[Path], None], type[StructPruneError], str, dict[str, Any]]] = {
    "family": (configured(model_type="opt"), UnsupportedError, "no GGUF form is known for this model family", {}),
    "activation": (
        configured(hidden_act="relu"),
        UnsupportedError,
        "computes this family otherwise; got activation relu, wanted silu",
        {},
    ),
    "sliced": (configured(structprune_sliced={"hidden_size": 96}), UnsupportedError, "matrices", {}),
    "quantised": (configured(quantization_config={}), UnsupportedError, "quantised", {}),
    "rope": (configured(**rope("dynamic", factor=2.0)), UnsupportedError, "scaling of the rotary positions", {}),
    "yarn": (
        configured(**rope("yarn", factor=2.0, original_max_position_embeddings=64, attention_factor=3.0)),
        UnsupportedError,
        "scaling of the rotary positions",
        {},
    ),
    "missing": (damaged(lambda t: t.pop(UP)), CheckpointError, "lacks tensor 'model.layers.1.mlp.up_proj", {}),
    "shape": (
        damaged(lambda t: t.update({UP: t[UP][:-8].clone()})),
        CheckpointError,
        "'model.layers.1.mlp.gate_proj.weight' is missing or has another shape",
        {},
    ),
    "extra": (
        damaged(lambda t: t.update({"extra.weight": torch.ones(2)})),
        UnsupportedError,
        "no place for 1 tensor",
        {},
    ),
    "nan": (damaged(lambda t: t[UP].fill_(torch.nan)), NumericalError, "NaN", {}),
    "float16": (
        damaged(lambda t: t[UP].fill_(1e6)),
        NumericalError,
        "values that float16 cannot",
        {"dtype": "float16"},
    ),
    "wordpiece": (
        lambda source: PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordPiece(vocab={"[UNK]": 0}, unk_token="[UNK]"))
        ).save_pretrained(source),
        UnsupportedError,
        "only SentencePiece's tokenizers and byte-level BPE.*WordPiece.*--tokenizer-gguf",
        {},
    ),
    "no merges": (tokenized(merges=False), UnsupportedError, "without merges", {}),
    "pre-tokenizer": (tokenized(pre=pre_tokenizers.Whitespace), UnsupportedError, "Whitespace", {}),
    "normaliser": (tokenized(normalizer=normalizers.Lowercase()), UnsupportedError, "Lowercase", {}),
    "no tokenizer": (lambda source: (source / "tokenizer.json").unlink(), UnsupportedError, "no tokenizer.json", {}),
    "no such gguf": (lambda source: None, CheckpointError, "does not exist", {"tokenizer_gguf": "nowhere.gguf"}),
    "no gguf": (lambda source: None, CheckpointError, "not GGUF", {"tokenizer_gguf": __file__}),
    "dtype": (lambda source: None, InputError, "unknown --dtype", {"dtype": "int4"}),
    "format": (
        lambda source: None,
        InputError,
        "unknown export format 'gguff'. Did you mean 'gguf'",
        {"format": "gguff"},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    change, error, message, options = BAD[case]
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    change(source)
    (tmp_path / "files").mkdir()
    with pytest.raises(error, match=message):
        export(source, tmp_path / "files" / "tiny.gguf", **options)
    assert list((tmp_path / "files").iterdir()) == []


def test_uneven_blocks_without_an_architecture_are_refused(tmp_path: Path) -> None:
    source, _ = uneven_checkpoint(Qwen3Config(**BROAD), tmp_path / "untied", {})
    with pytest.raises(UnsupportedError, match="openelm, which takes uneven qwen3 blocks, has no head of its own"):
        export(source, tmp_path / "tiny.gguf")
    config = GemmaConfig(**BROAD)
    source, _ = uneven_checkpoint(config, tmp_path / "gemma", {})
    with pytest.raises(UnsupportedError, match=r"no architecture of llama.cpp computes gemma with blocks of different"):
        export(source, tmp_path / "tiny.gguf")


def test_heads_without_an_architecture_are_refused(tmp_path: Path) -> None:
    config = Phi3Config(**SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=16)
    source, _ = stock_checkpoint(config, tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"phi3 with heads that do not share out the hidden.*--scope mlp"):
        export(source, tmp_path / "tiny.gguf")


def test_windows_that_llama_cpp_would_put_elsewhere_are_refused(tmp_path: Path) -> None:
    config = UNIFORM["gemma2"][0]()
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    source, _ = stock_checkpoint(config, tmp_path / "model")
    with pytest.raises(UnsupportedError, match="full attention in every block number divisible by 2"):
        export(source, tmp_path / "tiny.gguf")


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    other, _ = stock_checkpoint(LlamaConfig(**SIZES | {"vocab_size": 310}), tmp_path / "other")
    export(other, tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="310 tokens, wanted 300"):
        export(source, tmp_path / "tiny.gguf", tokenizer_gguf=tmp_path / "other.gguf")


def test_an_output_in_the_way_is_refused(tmp_path: Path) -> None:
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    (tmp_path / "tiny.gguf").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="the output file exists"):
        export(source, tmp_path / "tiny.gguf")
    assert (tmp_path / "tiny.gguf").read_text(encoding="utf-8") == "mine"
    with pytest.raises(InputError, match=r"ends in \.gguf; got tiny, wanted tiny\.gguf"):
        export(source, tmp_path / "tiny")


def test_too_little_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="not enough free disk"):
        export(source, tmp_path / "new" / "tiny.gguf")
    assert not (tmp_path / "new").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, model = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    with pytest.raises(SystemExit) as caught:
        main(["export", str(source), "--format", "gguf", "-o", str(tmp_path / "new" / "a.gguf"), "--json"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["bytes"] == (tmp_path / "new" / "a.gguf").stat().st_size
    # One line per tensor, with how many there are.
    lines = err.splitlines()
    assert len(lines) == result["num_tensors"]
    assert lines[0].startswith(f"write 1/{len(lines)}  token_embd.weight")
    assert_same(tmp_path / "new" / "a.gguf", model)
    with pytest.raises(SystemExit) as caught:
        main(["export", str(source), "-o", str(tmp_path / "new" / "a.gguf")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"structprune: {tmp_path / 'new' / 'a.gguf'}: the output file exists")


def test_names_of_the_files_do_not_count(tmp_path: Path) -> None:
    """A base model's names, a tied embedding that is stored as the head, stacked experts: the same bytes."""
    source, _ = stock_checkpoint(LlamaConfig(**SIZES, tie_word_embeddings=True), tmp_path / "model")
    export(source, tmp_path / "whole" / "a.gguf")
    weights = load_file(source / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    head = {"lm_head.weight" if "embed" in name else name: tensor for name, tensor in weights.items()}
    for name, tensors in {"bare": bare, "head": head}.items():
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        export(source, tmp_path / name / "a.gguf")
        assert (tmp_path / name / "a.gguf").read_bytes() == (tmp_path / "whole" / "a.gguf").read_bytes()


def test_stacked_experts_are_taken_apart(tmp_path: Path) -> None:
    source, model = stock_checkpoint(UNIFORM["qwen3_moe"][0](), tmp_path / "model")
    export(source, tmp_path / "apart" / "a.gguf")
    model.save_pretrained(source, save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in load_file(source / "model.safetensors"))
    export(source, tmp_path / "stacked" / "a.gguf")
    assert (tmp_path / "stacked" / "a.gguf").read_bytes() == (tmp_path / "apart" / "a.gguf").read_bytes()
