"""transformers' `rope_parameters` as keys and tensors of a GGUF file (rope_reading.py says what llama.cpp computes)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from structprune.architectures.gguf.description import GgufModel, Value
from structprune.architectures.gguf.rules import LENGTH_FACTORS, LLAMA3_FACTORS
from structprune.errors import UnsupportedError

# Tensors of factors that an architecture reads -> the scaling that they can hold.
_FACTOR_KINDS = {LLAMA3_FACTORS: "llama3", LENGTH_FACTORS: "longrope"}


def rope_parameters(model: GgufModel) -> Mapping[str, Any]:
    """Return the rotary parameters of the blocks with full attention."""
    config = model.config
    if not hasattr(config, "rope_parameters"):
        return {}
    config.standardize_rope_params()
    parameters: Mapping[str, Any] = config.rope_parameters or {}
    return parameters.get("full_attention", parameters)


def rope_factors(model: GgufModel) -> dict[str, Tensor]:
    """Return the tensors that divide the frequencies, (rotated dimensions / 2,) float32: LLaMA 3's or LongRoPE's.

    None where the scaling needs none, or where the architecture does not read the tensors that it needs.
    """
    parameters, target = rope_parameters(model), model.target.rope_factors
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


def write_rope(model: GgufModel, *, partial: bool, log_multiplier: bool, scale_is_one: bool = True) -> dict[str, Value]:
    """Return the keys of full attention's rotary positions. Raises UnsupportedError for a scaling that they lack.

    `log_multiplier`: a second scale of YaRN has a key; `scale_is_one`: the first is taken for 1.
    """
    parameters = rope_parameters(model)
    rotated = int(model.head_size * float(parameters.get("partial_rotary_factor") or 1.0))
    if rotated != model.head_size and not partial:
        raise UnsupportedError(
            f"llama.cpp's {model.target.architecture} turns whole heads", got=f"{rotated} of {model.head_size} turned"
        )
    values: dict[str, Value] = {
        "rope.dimension_count": rotated,
        "rope.freq_base": float(parameters["rope_theta"]),
    }
    kind, factors = parameters.get("rope_type", "default"), model.target.rope_factors
    if kind in ("llama3", "longrope") and rope_factors(model):
        # What the factors alone do not say.
        return values | _attention_factor(model, parameters) if kind == "longrope" else values
    if kind == "linear":
        return values | {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn" and parameters.get("truncate", True):
        multiplier = _log_multiplier(parameters, scale_is_one) if log_multiplier else {}
        if multiplier or not _own_yarn_factor(parameters):
            return values | _yarn(parameters) | multiplier
    if kind != "default":
        raise UnsupportedError(
            f"llama.cpp's {model.target.architecture} does not have this scaling of the rotary positions",
            got=", ".join(f"{name} {value}" for name, value in parameters.items()),
            wanted="default, linear, yarn with its own attention factor"
            + (f", {_FACTOR_KINDS[factors]}" if factors in _FACTOR_KINDS else ""),
        )
    return values


def _yarn(parameters: Mapping[str, Any]) -> dict[str, Value]:
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(parameters["factor"]),
        "rope.scaling.original_context_length": int(parameters["original_max_position_embeddings"]),
        "rope.scaling.yarn_beta_fast": float(parameters.get("beta_fast") or 32),
        "rope.scaling.yarn_beta_slow": float(parameters.get("beta_slow") or 1),
    }


def _attention_factor(model: GgufModel, parameters: Mapping[str, Any]) -> dict[str, Value]:
    """Return what LongRoPE multiplies sines and cosines with (transformers' _compute_longrope_parameters)."""
    _, factor = ROPE_INIT_FUNCTIONS["longrope"](model.config)
    original = int(parameters["original_max_position_embeddings"])
    return {"rope.scaling.attn_factor": float(factor), "rope.scaling.original_context_length": original}


def _log_multiplier(parameters: Mapping[str, Any], scale_is_one: bool) -> dict[str, Value]:
    """Return the key of YaRN's second scale; nothing where the first is not 1, which llama.cpp takes it for."""
    if parameters.get("attention_factor") is not None or (scale_is_one and parameters.get("mscale") != 1.0):
        return {}
    second = parameters.get("mscale_all_dim")
    return {"rope.scaling.yarn_log_multiplier": float(second)} if second else {}


def _own_yarn_factor(parameters: Mapping[str, Any]) -> bool:
    """Whether the config names another attention factor than the one that follows from the scaling factor."""
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return True
    given = parameters.get("attention_factor")
    return given is not None and not math.isclose(given, 0.1 * math.log(parameters["factor"]) + 1.0, rel_tol=1e-6)
