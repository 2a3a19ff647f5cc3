"""Tiny random models of causal decoders that have no family file, made from their configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from support.models import COMMON

SIZES: dict[str, Any] = {**COMMON, "num_hidden_layers": 4, "pad_token_id": None}
MIXTURE: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "num_key_value_heads": 4,
}
DELTA: dict[str, Any] = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
STATES: dict[str, Any] = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 6,
    "mamba_expand": 1,
    "mamba_chunk_size": 8,
    "mamba_d_conv": 4,
}
HEADS: dict[str, Any] = {"head_dim": 8}
OLD: dict[str, Any] = {"n_head": 4, "n_layer": 4}

TINY_DECODERS: Mapping[str, dict[str, Any]] = {
    "afmoe": MIXTURE | HEADS,
    "bloom": OLD,
    "cohere2": {},
    "deepseek_v3": MIXTURE | LATENT,
    "exaone4": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": STATES | HEADS,
    "gemma": HEADS,
    "gemma4_text": HEADS,
    "glm4": HEADS,
    "gpt_oss": MIXTURE | HEADS,
    "gptj": {**OLD, "n_embd": 32, "n_inner": 48, "rotary_dim": 4},
    "granite": {},
    "jamba": MIXTURE | {"mamba_d_state": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "llama4_text": MIXTURE | HEADS,
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 6, "expand": 2, "n_groups": 2, "chunk_size": 8},
    "ministral3": HEADS,
    "mixtral": MIXTURE,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2},
    "nemotron": HEADS,
    "olmo2": {},
    "olmo3": {},
    "phi": {},
    "qwen3_5_text": DELTA | HEADS,
    "qwen3_next": DELTA | MIXTURE | HEADS,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}
"""`model_type` -> what its config is given beside `SIZES`."""


def tiny_decoder(model_type: str) -> Any:
    """A random model, with attention by SDPA where stock code has it."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **TINY_DECODERS[model_type]})
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError:
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
