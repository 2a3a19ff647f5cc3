"""GGUF files as sources: what is computed from them is what llama.cpp computes from the file itself."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gguf import GELU, PROMPTS, SIZES, UNIFORM, VOCAB, logprobs, rope, stock_checkpoint
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config

from structprune.api import export
from structprune.architectures.gguf.table import READ_AS
from structprune.architectures.sources.gguf import open_gguf
from structprune.architectures.stock.loading import load_model
from structprune.checkpoint.gguf_file import read_gguf
from structprune.errors import CheckpointError, UnsupportedError
from support.command_line import CommandLine
from support.gguf_files import copy_gguf
from support.llama_runtime import run_llama

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")

HALF = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
LENGTHS = {
    "short_factor": [1.0 + 0.1 * index for index in range(HALF)],
    "long_factor": [1.5 + 0.4 * index for index in range(HALF)],
}
# As the files of test_gguf.py, and those that only a reader meets; name -> config.
MODELS: dict[str, Callable[[], Any]] = {
    **{name: config for name, (config, architecture) in UNIFORM.items() if architecture in READ_AS},
    "gemma3-scaled": lambda: Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 7},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt2": lambda: GPT2Config(
        n_embd=64, n_layer=3, n_head=4, n_positions=256, vocab_size=VOCAB, n_inner=96, bos_token_id=0, eos_token_id=0
    ),
    "phi3-short": lambda: Phi3Config(
        **SIZES | {"max_position_embeddings": 4096},
        original_max_position_embeddings=1024,
        **rope("longrope", **LENGTHS, original_max_position_embeddings=1024),
    ),
    "phi3-partial": lambda: Phi3Config(**SIZES, **rope("default", partial_rotary_factor=0.5)),
}


def atol(name: str) -> float:
    """llama.cpp's table of GELU has half precision."""
    return 5e-3 if name.startswith(("gemma", "gpt")) or name in GELU else 2e-4


def exported(config: Any, folder: Path) -> Path:
    """A random model of this config, written as GGUF in float32."""
    source, _ = stock_checkpoint(config, folder / "model")
    export(source, folder / "model.gguf", dtype="float32")
    return folder / "model.gguf"


def read(path: Path, dtype: torch.dtype | None = None) -> Any:
    """The model in memory that the file is read as."""
    return load_model(open_gguf(path, dtype), torch.device("cpu"), torch.float32)


def assert_read_right(path: Path, *, atol: float, prompts: list[list[int]] = PROMPTS) -> None:
    found_NV = logprobs(read(path, torch.float32), prompts)
    wanted_NV = run_llama(path, prompts, VOCAB).logprobs_NV
    torch.testing.assert_close(found_NV, wanted_NV, rtol=0, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_read_as_llama_cpp_reads_it(name: str, tmp_path: Path) -> None:
    path = exported(MODELS[name](), tmp_path)
    assert_read_right(path, atol=atol(name))
    quantised = copy_gguf(path, tmp_path / "q8.gguf", quantise=gguf.GGMLQuantizationType.Q8_0)
    assert {info.kind_name for info in read_gguf(quantised).tensors.values()} >= {"Q8_0", "F32"}
    # llama.cpp rounds activations to eight bits too.
    assert_read_right(quantised, atol=0.35)
    exact = logprobs(read(quantised, torch.float32))
    rounded = logprobs(read(path, torch.float32))
    assert not torch.equal(exact, rounded)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(LlamaConfig(**SIZES), tmp_path_factory.mktemp("llama"))


ROPE: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 4.0},
    "none, whatever the factor": {"type": "none", "factor": 4.0},
    "factor of attention alone": {"type": "linear", "factor": 1.0, "attn_factor": 1.5},
    "linear with a factor of attention": {"type": "linear", "factor": 2.0, "attn_factor": 1.5},
    "yarn": {"type": "yarn", "factor": 4.0, "original_context_length": (64, gguf.GGUFValueType.UINT32)},
    "yarn with the betas that llama.cpp takes": {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": (64, gguf.GGUFValueType.UINT32),
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "attn_factor": 1.5,
    },
}


@pytest.mark.parametrize("case", ROPE)
def test_keys_of_the_rotary_scaling(case: str, llama: Path, tmp_path: Path) -> None:
    """Every one changes what llama.cpp computes, and what is read is what it computes."""
    keys = {f"llama.rope.scaling.{name}": value for name, value in ROPE[case].items()}
    path = copy_gguf(llama, tmp_path / "a.gguf", keys=keys)
    assert_read_right(path, atol=2e-4)


def add(**more: np.ndarray[Any, Any]) -> Callable[[dict[str, Any]], None]:
    """A change of a file's tensors that puts in `more`; a double underscore stands for a dot."""
    return lambda tensors: tensors.update({name.replace("__", "."): value for name, value in more.items()})


@pytest.mark.parametrize("values", [[1.0, 1.0, 2.0, 2.0, 8.0, 8.0, 8.0, 8.0], [3.0, 1.0, 2.0, 7.0, 1.0, 5.0, 2.0, 9.0]])
def test_factors_that_no_scaling_has(values: list[float], llama: Path, tmp_path: Path) -> None:
    """They are no LLaMA 3's, and are written as factors that are the same for all lengths."""
    path = copy_gguf(llama, tmp_path / "a.gguf", change=add(rope_freqs__weight=np.array(values, dtype=np.float32)))
    assert_read_right(path, atol=2e-4)
    config = open_gguf(path).config["rope_parameters"]
    assert config["rope_type"] == "longrope"
    assert config["short_factor"] == config["long_factor"] == values


def test_biases_of_some_maps(llama: Path, tmp_path: Path) -> None:
    """Stock code has all of them or none: those that the file lacks are zero."""
    generator = np.random.default_rng(0)

    def change(tensors: dict[str, Any]) -> None:
        for block, name, size in ((0, "attn_q", 64), (2, "attn_output", 64), (1, "attn_k", 32)):
            tensors[f"blk.{block}.{name}.bias"] = generator.normal(size=size).astype(np.float32)

    path = copy_gguf(llama, tmp_path / "a.gguf", change=change)
    assert_read_right(path, atol=2e-4)
    reader = open_gguf(path)
    assert reader.config["attention_bias"] is True
    assert not reader.read(["model.layers.0.self_attn.v_proj.bias"])["model.layers.0.self_attn.v_proj.bias"].any()


def test_queries_keys_and_values_in_one_tensor(llama: Path, tmp_path: Path) -> None:
    """As some converters write them; the rows are in that order."""

    def fuse(tensors: dict[str, Any]) -> None:
        for block in range(3):
            names = [f"blk.{block}.{name}.weight" for name in ("attn_q", "attn_k", "attn_v")]
            tensors[f"blk.{block}.attn_qkv.weight"] = np.concatenate([tensors.pop(name) for name in names])

    path = copy_gguf(llama, tmp_path / "a.gguf", change=fuse)
    assert torch.equal(logprobs(read(path, torch.float32)), logprobs(read(llama, torch.float32)))


def test_widths_are_kept_bit_for_bit(tmp_path: Path) -> None:
    """A bfloat16 checkpoint comes back from its file as it was, whatever order its rows have there."""
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), tmp_path / "model")
    weights = {name: value.to(torch.bfloat16) for name, value in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    export(source, tmp_path / "a.gguf", dtype="bfloat16")
    reader = open_gguf(tmp_path / "a.gguf")
    assert reader.config["dtype"] == "bfloat16"
    found = reader.read(list(reader.shapes))
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], value), name


LEFT_OVER: dict[str, tuple[dict[str, Any], str]] = {
    "a scale of attention": ({"llama.attention.scale": 0.5}, "llama.attention.scale"),
    "a soft cap": ({"llama.attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping"),
    "a window": ({"llama.attention.sliding_window": 4}, "llama.attention.sliding_window"),
    "a scale of the logits": ({"llama.logit_scale": 0.25}, "llama.logit_scale"),
    "a scale of the residual stream": ({"llama.residual_scale": 0.2}, "llama.residual_scale"),
    "a bound of queries and keys": ({"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv"),
    "ALiBi": ({"llama.attention.max_alibi_bias": 8.0}, "llama.attention.max_alibi_bias"),
    "no causal mask": ({"llama.attention.causal": False}, "llama.attention.causal"),
    "pooling": ({"llama.pooling_type": 1}, "llama.pooling_type"),
    "a key of a later version": ({"llama.rope.scaling.something_new": 2.0}, "llama.rope.scaling.something_new"),
    "sections of the rotary positions": ({"llama.rope.dimension_sections": [8, 8]}, "llama.rope.dimension_sections"),
    # llama.cpp does not read it for this architecture, transformers would.
    "other betas of yarn": ({"llama.rope.scaling.yarn_beta_slow": 2.0}, "llama.rope.scaling.yarn_beta_slow"),
    "a key of nobody": ({"clip.vision.something": 1}, "clip.vision.something"),
    "a key of the tokenizer": (
        {"tokenizer.ggml.remove_extra_whitespaces": True},
        "tokenizer.ggml.remove_extra_whitespaces",
    ),
    "characters that are changed first": (
        {"tokenizer.ggml.precompiled_charsmap": [1, 2]},
        "tokenizer.ggml.precompiled_charsmap",
    ),
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_a_key_without_a_reader_ends_the_run(case: str, llama: Path, tmp_path: Path) -> None:
    keys, name = LEFT_OVER[case]
    path = copy_gguf(llama, tmp_path / "a.gguf", keys=keys)
    with pytest.raises(UnsupportedError, match=rf"would be lost: .*{re.escape(name)}.* has no reader"):
        open_gguf(path)


def test_special_tokens_beyond_the_vocabulary_are_none(llama: Path, tmp_path: Path) -> None:
    """As in llama.cpp; a padding token without a row would make a model that cannot be built."""
    rows = open_gguf(llama).config["vocab_size"]
    keys = {f"tokenizer.ggml.{name}_token_id": (rows, gguf.GGUFValueType.UINT32) for name in ("padding", "eos")}
    found = open_gguf(copy_gguf(llama, tmp_path / "a.gguf", keys=keys))
    assert (found.config["pad_token_id"], found.config["eos_token_id"]) == (None, None)
    assert torch.isfinite(logprobs(read(tmp_path / "a.gguf", torch.float32))).all()


def test_a_negative_scaling_of_positions_is_refused(llama: Path, tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": -2.0, "llama.rope.scaling.attn_factor": 2.0}
    with pytest.raises(CheckpointError, match=r"the scaling of the rotary positions is not positive; got -2"):
        open_gguf(copy_gguf(llama, tmp_path / "a.gguf", keys=keys))


def test_keys_without_an_effect_are_taken(llama: Path, tmp_path: Path) -> None:
    """At these values llama.cpp computes nothing else."""
    keys = {"llama.attention.scale": 0.0, "llama.logit_scale": 1.0, "llama.attention.causal": True}
    more = {"llama.expert_count": 0, "llama.rope.scaling.finetuned": True, "general.quantized_by": "somebody"}
    path = copy_gguf(llama, tmp_path / "a.gguf", keys={**keys, **more})
    assert torch.equal(logprobs(read(path, torch.float32)), logprobs(read(llama, torch.float32)))


VERBS = {
    "inspect": [],
    "plan": [],
    "prune": ["-o", "OUT", "--calibration", "TEXT"],
    "eval": ["--text", "TEXT"],
    "eval --stream": ["--text", "TEXT"],
    "bench": ["--prompt", "8"],
    "export": ["--format", "gguf", "-o", "OUT.gguf"],
    "compare": ["-o", "OUT", "--methods", "fasp", "--sparsities", "0.3", "--calibration", "TEXT", "--text", "TEXT"],
    "recover": ["--teacher", "MODEL", "-o", "OUT", "--calibration", "TEXT"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_tensor_without_a_reader_ends_every_verb(
    verb: str, llama: Path, text_file: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    """Before any work: one line with its name, and nothing is left."""
    extra = np.ones(64, dtype=np.float32)
    model = copy_gguf(llama, tmp_path / "a.gguf", change=add(blk__1__attn_sinks__weight=extra))
    named = {"OUT": tmp_path / "out", "OUT.gguf": tmp_path / "out.gguf", "TEXT": text_file, "MODEL": model}
    first, *more = verb.split()
    code, _, error = command_line(first, model, *more, *(named.get(flag, flag) for flag in VERBS[verb]))
    assert code == 2, error
    assert "would be lost: tensor 'blk.1.attn_sinks.weight' has no reader" in error
    assert "got F32 [64] in a file of architecture llama" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_large_file_is_inspected_from_its_header(
    tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TinyLlama's shapes, 1.1B parameters: a file that has holes where its weights would be. Nothing is converted."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    small = exported(
        LlamaConfig(**SIZES | {"num_hidden_layers": 1, "hidden_size": 64, "max_position_embeddings": 2048}),
        tmp_path / "small",
    )
    reader: Any = gguf.GGUFReader(str(small))
    writer: Any = gguf.GGUFWriter(None, "llama")
    sizes = {"block_count": 22, "embedding_length": 2048, "feed_forward_length": 5632, "attention.head_count": 32}
    sizes |= {"attention.head_count_kv": 4, "attention.key_length": 64, "attention.value_length": 64}
    sizes |= {"rope.dimension_count": 64, "vocab_size": 32000}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = sizes.get(key.removeprefix("llama."), field.contents())
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, value, field.types[0], sub_type=sub_type)
    q4 = gguf.GGMLQuantizationType.Q4_0
    shapes = {"attn_q": (2048, 2048), "attn_k": (256, 2048), "attn_v": (256, 2048), "attn_output": (2048, 2048)}
    shapes |= {"ffn_gate": (5632, 2048), "ffn_up": (5632, 2048), "ffn_down": (2048, 5632)}
    blocks = {f"blk.{b}.{name}.weight": shape for b in range(22) for name, shape in shapes.items()}
    norms = {f"blk.{b}.{name}.weight": (2048,) for b in range(22) for name in ("attn_norm", "ffn_norm")}
    for name, shape in ({"token_embd.weight": (32000, 2048), "output.weight": (32000, 2048)} | blocks).items():
        raw = (*shape[:-1], shape[-1] // 32 * 18)
        writer.add_tensor_info(name, raw, np.dtype(np.uint8), math.prod(raw), raw_dtype=q4)
    for name, shape in ({"output_norm.weight": (2048,)} | norms).items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
    path = tmp_path / "tiny-llama.gguf"
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as handle:
        handle.truncate(path.stat().st_size + 700_000_000)
    started = time.perf_counter()
    code, shown, error = command_line("inspect", path)
    seconds = time.perf_counter() - started
    assert code == 0, error
    assert "1,100,048,384" in shown
    # 50 s and 4.2 GB of float32 in a cache is what converting it took.
    assert seconds < 10
    assert not (tmp_path / "cache").exists()
