"""Hyperparameters of a GGUF file, from the parsed config and from the widths that the tensors have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from structprune.architectures.sources.gguf_families import (
    LENGTH_FACTORS,
    LLAMA3_FACTORS,
    GgufFamily,
    Target,
)
from structprune.errors import UnsupportedError

# Tensors of factors that an architecture reads -> the scaling that they can hold.
_FACTOR_KINDS = {LLAMA3_FACTORS: "llama3", LENGTH_FACTORS: "longrope"}

Value = int | float | str | bool | list[int]
"""int is written as uint32, float as float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWidths:
    """One block of the file."""

    index: int
    """Number of the block in the checkpoint."""
    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """What the metadata is made of."""

    config: Any
    """The parsed config, its per-layer part left out."""
    family: GgufFamily
    target: Target
    head_size: int
    blocks: tuple[BlockWidths, ...]


def hyperparameters(model: GgufModel) -> dict[str, Value]:
    """Return the entries without the architecture's name in front. Raises UnsupportedError for what cannot be said."""
    config = model.config
    _check_window(model)
    widths = {
        "feed_forward_length": [block.channels for block in model.blocks],
        "attention.head_count": [block.heads for block in model.blocks],
        "attention.head_count_kv": [block.kv_heads for block in model.blocks],
    }
    values: dict[str, Value] = {
        "block_count": len(model.blocks),
        "context_length": _context_length(model),
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        **{name: value if model.target.lists_widths else value[0] for name, value in widths.items()},
    }
    for name in model.target.metadata:
        values |= _ENTRIES[name](model)
    return values


def rope_factors(model: GgufModel) -> dict[str, Tensor]:
    """Return the tensors that divide the frequencies, (rotated dimensions / 2,) float32: LLaMA 3's or LongRoPE's.

    None where the scaling needs none, or where the architecture does not read the tensors that it needs.
    """
    parameters, target = _rope(model), model.target.rope_factors
    kind = parameters.get("rope_type")
    if kind == "llama3" and target == LLAMA3_FACTORS:
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config)
        powers = torch.arange(0, model.head_size, 2, dtype=torch.float32) / model.head_size
        return {target[0]: 1.0 / (parameters["rope_theta"] ** powers) / scaled.float()}
    if kind == "longrope" and target == LENGTH_FACTORS:
        names = ("long_factor", "short_factor")
        return {tensor: torch.tensor(parameters[name]) for tensor, name in zip(target, names, strict=True)}
    if kind == "longrope" and target == LLAMA3_FACTORS and parameters["long_factor"] == parameters["short_factor"]:
        return {target[0]: torch.tensor(parameters["long_factor"])}
    return {}


def _context_length(model: GgufModel) -> int:
    """Return the number of positions; no more than the sliding window where the architecture attends to everything."""
    config = model.config
    length: int = config.max_position_embeddings
    if model.family.window == "caps-context" and "sliding_attention" in _layer_types(model):
        length = min(length, config.sliding_window)
    return length


def _layer_types(model: GgufModel) -> list[str]:
    """List the attention type of every block; Mistral and Phi-3 have one config entry for all."""
    config = model.config
    types = getattr(config, "layer_types", None)
    if types:
        return [types[block.index] for block in model.blocks]
    window = getattr(config, "sliding_window", None)
    return ["sliding_attention" if window else "full_attention"] * len(model.blocks)


def _check_window(model: GgufModel) -> None:
    """Check that the blocks with a window are those that llama.cpp expects, which knows them by their numbers."""
    period = {"alternating": 2, "five-of-six": 6}.get(model.family.window)
    if period is None:
        return
    wanted = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(model.blocks))]
    if _layer_types(model) != wanted:
        raise UnsupportedError(
            f"llama.cpp's {model.target.architecture} has full attention in every block number divisible by {period}",
            got=f"layer_types {_layer_types(model)}",
            do="export a model that has lost no blocks",
        )


def _rms_epsilon(model: GgufModel) -> dict[str, Value]:
    return {"attention.layer_norm_rms_epsilon": float(model.config.rms_norm_eps)}


def _layer_norm_epsilon(model: GgufModel) -> dict[str, Value]:
    config = model.config
    epsilon = config.layer_norm_epsilon if hasattr(config, "layer_norm_epsilon") else config.layer_norm_eps
    return {"attention.layer_norm_epsilon": float(epsilon)}


def _head_size(model: GgufModel) -> dict[str, Value]:
    config = model.config
    scale = getattr(config, "query_pre_attn_scalar", None)
    # llama.cpp knows the largest Gemma by its blocks, and that it scales otherwise.
    largest = len(model.blocks) == {"alternating": 46, "five-of-six": 62}.get(model.family.window)
    wanted = config.hidden_size // config.num_attention_heads if largest else model.head_size
    if scale is not None and scale != wanted:
        raise UnsupportedError(
            "llama.cpp divides the attention scores of a model with so many blocks by the root of another number",
            got=f"query_pre_attn_scalar {scale}, {len(model.blocks)} blocks",
            wanted=wanted,
        )
    return {"attention.key_length": model.head_size, "attention.value_length": model.head_size}


def _rope(model: GgufModel) -> Mapping[str, Any]:
    """Return the rotary parameters of the blocks with full attention."""
    config = model.config
    if not hasattr(config, "rope_parameters"):
        return {}
    config.standardize_rope_params()
    parameters: Mapping[str, Any] = config.rope_parameters or {}
    return parameters.get("full_attention", parameters)


def _rotary(model: GgufModel) -> dict[str, Value]:
    parameters = _rope(model)
    share = float(parameters.get("partial_rotary_factor", 1.0))
    values: dict[str, Value] = {
        "rope.dimension_count": int(model.head_size * share),
        "rope.freq_base": float(parameters["rope_theta"]),
    }
    kind, factors = parameters.get("rope_type", "default"), model.target.rope_factors
    if kind in ("llama3", "longrope") and rope_factors(model):
        # What the factors alone do not say.
        return values | _attention_factor(model, parameters) if kind == "longrope" else values
    if kind == "linear":
        return values | {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn" and not _own_yarn_factor(parameters) and parameters.get("truncate", True):
        return values | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(parameters["factor"]),
            "rope.scaling.original_context_length": int(parameters["original_max_position_embeddings"]),
            "rope.scaling.yarn_beta_fast": float(parameters.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(parameters.get("beta_slow") or 1),
        }
    if kind != "default":
        raise UnsupportedError(
            f"llama.cpp's {model.target.architecture} does not have this scaling of the rotary positions",
            got=", ".join(f"{name} {value}" for name, value in parameters.items()),
            wanted="default, linear, yarn with its own attention factor"
            + (f", {_FACTOR_KINDS[factors]}" if factors in _FACTOR_KINDS else ""),
        )
    return values


def _attention_factor(model: GgufModel, parameters: Mapping[str, Any]) -> dict[str, Value]:
    """Return what LongRoPE multiplies sines and cosines with (transformers' _compute_longrope_parameters)."""
    _, factor = ROPE_INIT_FUNCTIONS["longrope"](model.config)
    original = int(parameters["original_max_position_embeddings"])
    return {"rope.scaling.attn_factor": float(factor), "rope.scaling.original_context_length": original}


def _own_yarn_factor(parameters: Mapping[str, Any]) -> bool:
    """Whether the config names another attention factor than the one that follows from the scaling factor."""
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return True
    given = parameters.get("attention_factor")
    return given is not None and not math.isclose(given, 0.1 * math.log(parameters["factor"]) + 1.0, rel_tol=1e-6)


def _local_rotary(model: GgufModel) -> dict[str, Value]:
    """Return the rotary entry of the blocks with a sliding window, which have their own base and no scaling."""
    parameters = model.config.rope_parameters["sliding_attention"]
    if parameters.get("rope_type", "default") != "default":
        raise UnsupportedError("llama.cpp scales no rotary positions of sliding windows", got=dict(parameters))
    return {"rope.freq_base_swa": float(parameters["rope_theta"])}


def _original_context(model: GgufModel) -> dict[str, Value]:
    if _rope(model).get("rope_type") == "longrope":
        return {}
    original = getattr(model.config, "original_max_position_embeddings", None) or model.config.max_position_embeddings
    return {"rope.scaling.original_context_length": int(original)}


def _experts(model: GgufModel) -> dict[str, Value]:
    config = model.config
    return {
        "feed_forward_length": int(config.intermediate_size),
        "expert_count": int(config.num_experts),
        "expert_used_count": int(config.num_experts_per_tok),
        "expert_feed_forward_length": model.blocks[0].channels,
    }


def _parallel_residual(model: GgufModel) -> dict[str, Value]:
    return {"use_parallel_residual": bool(model.config.use_parallel_residual)}


def _sliding_window(model: GgufModel) -> dict[str, Value]:
    return {"attention.sliding_window": int(model.config.sliding_window or 0)}


def _soft_caps(model: GgufModel) -> dict[str, Value]:
    config = model.config
    if not config.attn_logit_softcapping or not config.final_logit_softcapping:
        raise UnsupportedError("llama.cpp's gemma2 caps both attention scores and logits", got="a config without caps")
    return {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


_ENTRIES: Mapping[str, Callable[[GgufModel], dict[str, Value]]] = {
    "rms_epsilon": _rms_epsilon,
    "layer_norm_epsilon": _layer_norm_epsilon,
    "head_size": _head_size,
    "rotary": _rotary,
    "local_rotary": _local_rotary,
    "original_context": _original_context,
    "experts": _experts,
    "parallel_residual": _parallel_residual,
    "sliding_window": _sliding_window,
    "soft_caps": _soft_caps,
}
