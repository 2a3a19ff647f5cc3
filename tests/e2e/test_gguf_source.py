"""GGUF files as sources: what is computed from them is what llama.cpp computes from the file itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import GELU, PROMPTS, SIZES, UNIFORM, VOCAB, logprobs, rope, stock_checkpoint
from transformers import Gemma3TextConfig, GPT2Config, Phi3Config

from structprune.api import export
from structprune.architectures.sources.gguf import open_gguf
from structprune.architectures.sources.gguf_config import READINGS
from structprune.architectures.stock.loading import load_model
from structprune.checkpoint.gguf_file import read_gguf
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
    **{name: config for name, (config, architecture) in UNIFORM.items() if architecture in READINGS},
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


def test_every_architecture_is_read_by_a_test() -> None:
    assert {config().model_type for config in MODELS.values()} - {"mistral"} == {
        r.model_type for r in READINGS.values()
    }
