"""The rows of docs/exports.md: a small model of every family, and every way to prune it.

Heads of 32 dimensions are the smallest that vLLM's attention takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from structprune import Recipe
from structprune.architectures.modeling.removed import REMOVED_ENTRY

_TOKENS: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_NEOX = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
}
# Windows that are shorter than the prompts.
_GEMMA = {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}

MODELS: Mapping[str, Callable[[], Any]] = {
    "gemma2": lambda: Gemma2Config(**_GEMMA),
    "gemma3_text": lambda: Gemma3TextConfig(**_GEMMA | {"num_hidden_layers": 7}),
    "gpt2": lambda: GPT2Config(**_TOKENS, n_embd=128, n_layer=3, n_head=4, n_positions=256, n_inner=80),
    "gpt_neox": lambda: GPTNeoXConfig(**_NEOX),
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "opt": lambda: OPTConfig(
        **_TOKENS | {"pad_token_id": 1},
        hidden_size=128,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=128,
        max_position_embeddings=256,
    ),
    "phi3": lambda: Phi3Config(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=64),
    "qwen3, tied": lambda: Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True
    ),
}
"""Row -> config. Every family once, and what makes a difference for the formats."""

STRUCTURES: Mapping[str, dict[str, Any]] = {
    "Equal widths, fewer MLP channels (`--structure uniform`)": {"method": "magnitude", "structure": "uniform"},
    "Equal widths, fewer heads (`--structure uniform --scope attention`)": {
        "method": "wanda-sp",
        "structure": "uniform",
        "scope": "attention",
        "sparsity": 0.4,
    },
    "Fewer blocks (`--method depth`)": {"method": "depth"},
    "Fewer experts (`--method reap`)": {"method": "reap"},
    "Uneven MLP widths (`--structure per-layer`)": {
        "method": "structprune",
        "structure": "per-layer",
        "protect_first": 1,
    },
    "Uneven MLP widths and heads (`--structure per-layer --scope all`)": {
        "method": "structprune",
        "structure": "per-layer",
        "scope": "all",
        "protect_first": 1,
    },
    "Uneven widths, some blocks without attention or MLP (`--allow-block-removal`)": {
        "method": "structprune",
        "structure": "per-layer",
        "scope": "all",
        "sparsity": 0.7,
        "allow_block_removal": True,
    },
    "Uneven widths of values (`--method fasp --scope attention --head-units value-channel`)": {
        "method": "fasp",
        "scope": "attention",
        "head_units": "value-channel",
    },
    "Narrower residual stream, with shortcuts (`--method slicegpt`)": {"method": "slicegpt", "sparsity": 0.1},
}
"""Heading -> settings of the run."""

# Families with a step of widths.
_STEPS = {"qwen3_moe": 8}
_COMMON: dict[str, Any] = {"sparsity": 0.3, "num_samples": 4, "seq_len": 32, "dtype": "float32"}


def recipe_of(model: str, heading: str, calibration: Path) -> Recipe:
    """The run that makes the model's output in the section `heading`."""
    settings = _COMMON | {"calibration": str(calibration)} | STRUCTURES[heading]
    if settings["method"] not in ("depth", "reap"):
        settings["multiple_of"] = _STEPS.get(model, 4 if settings["method"] == "slicegpt" else 1)
    return Recipe.build(**settings)


def folder_of(model: str, heading: str) -> str:
    """A name for the output without the model's: llama.cpp looks for certain tokens where it finds "phi3" in it."""
    return f"{list(MODELS).index(model)}-{list(STRUCTURES).index(heading)}"


def check_structure(heading: str, output: Path) -> None:
    """The run made what the heading says."""
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    settings = STRUCTURES[heading]
    assert (REMOVED_ENTRY in config) is bool(settings.get("allow_block_removal"))
    if settings.get("structure") == "per-layer" and REMOVED_ENTRY not in config:
        blocks = config["per_layer_config"].values()
        assert len({tuple(block.items()) for block in blocks}) > 1, "the widths are even"
