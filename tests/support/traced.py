"""Tiny decoders without a family file that tracing describes, and how they are written to disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from support.decoders import DELTA, HEADS, LATENT, MIXTURE, OLD, SIZES, STATES, TINY_DECODERS
from support.models import byte_tokenizer, spread_weights

WINDOWS: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}
CONVOLUTIONS: dict[str, Any] = {
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "conv_L_cache": 3,
    "block_ff_dim": 48,
    "block_auto_adjust_ff_dim": False,
}
DESCRIBED: Mapping[str, dict[str, Any]] = {
    # Factors on the residual sums, the embedding and the logits.
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 5.0,
        "tie_word_embeddings": True,
    },
    "cohere2": {**WINDOWS, "logit_scale": 0.3},
    "gemma": {},
    # Tables that each block computes, one norm for both sublayers, biases in the head.
    "gptj": {"n_layer": 6},
    # Norms behind the sublayers.
    "glm4": {},
    "exaone4": WINDOWS,
    # A norm over all heads holds them.
    "olmo2": {},
    "olmo3": WINDOWS,
    # Positions in some blocks only.
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    # Older code that picks its attention by name, and adds in place.
    "falcon": {},
    "starcoder2": {},
    "phi": {},
    "stablelm": {},
    "nemotron": {},
    "ministral3": {},
    # Stacked experts: with names of single ones in files, and without; one for all tokens beside the others.
    "mixtral": {},
    "gpt_oss": WINDOWS,
    "llama4_text": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 40},
    # Blocks with experts and without.
    "deepseek_v3": {},
    # An expert for all tokens that is twice as wide by the same entry.
    "ernie4_5_moe": {**MIXTURE, **HEADS, "moe_num_shared_experts": 2},
    # Positions that mix without attention: in other blocks, and beside it.
    "qwen3_5_text": {},
    "jamba": {},
    "falcon_h1": {},
    # Sizes of heads per block in the stock config, a number that the stream is multiplied by.
    "gemma4_text": {"hidden_size_per_layer_input": 0, "global_head_dim": 16, **WINDOWS},
    # MLPs whose width follows from the hidden size.
    "bloom": {},
    "mpt": {},
}
"""`model_type` -> what its config is given beside that of `TINY_DECODERS`."""
COMMON_MIXTURES = (
    *("cohere2_moe", "dots1", "exaone_moe", "glm4_moe", "granitemoe", "mellum", "minimax_m2", "olmoe", "phimoe"),
    "solar_open",
)
OTHERS: Mapping[str, dict[str, Any]] = {
    **{name: {**MIXTURE, **HEADS} for name in COMMON_MIXTURES},
    "codegen": {**OLD, "n_embd": 32, "n_inner": 48, "rotary_dim": 4},
    "deepseek_v2": {**MIXTURE, **LATENT, "n_shared_experts": 2},
    "deepseek_v32": {**MIXTURE, **LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8},
    "glm4_moe_lite": {**MIXTURE, **LATENT},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {
        **STATES,
        "mamba_d_head": 16,
        "mamba_expand": 2,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
    },
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "minicpm3": LATENT,
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": {**MIXTURE, **CONVOLUTIONS, "num_dense_layers": 1},
    "ministral": HEADS,
    "openai-gpt": {**OLD, "n_embd": 32},
    "qwen2_moe": MIXTURE,
    "qwen3_5_moe_text": {**MIXTURE, **DELTA, **HEADS},
    "youtu": LATENT,
}
"""More types that the common sizes alone do not build."""
TRACED = (
    *("apertus", "arcee", "biogpt", "codegen", "cohere", "cwm", "diffllama", "ernie4_5", "glm", "gpt_bigcode"),
    *("granite_swa", "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "jais2", "minicpm3"),
    *("ministral", "nanochat", "olmo", "persimmon", "seed_oss", "vaultgemma", "youtu", "lfm2", "lfm2_moe", "qwen2_moe"),
    *("cohere2_moe", "deepseek_v2", "deepseek_v32", "dots1", "exaone_moe", "glm4_moe", "glm4_moe_lite", "granitemoe"),
    "granitemoehybrid",
    *("mellum", "minimax_m2", "olmoe", "phimoe", "qwen3_5_moe_text", "qwen3_next", "solar_open"),
)
"""Types that are described beside these, for the slow tests."""
OWN_MLP = ("bloom", "mpt")
"""Types whose MLPs lose channels by our modelling file alone."""
HELD_HEADS = {
    **dict.fromkeys(("bloom", "mpt"), "cannot express fewer attention"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), "cannot express fewer attention"),
    **dict.fromkeys(("minimax_m2", "olmoe"), "this attention has no KV heads that can leave"),
    **dict.fromkeys(
        ("biogpt", "codegen", "helium", "minicpm3", "persimmon", "youtu"), "cannot express fewer attention"
    ),
    "gpt_bigcode": "this attention has no KV heads that can leave",
    "falcon": "stock falcon cannot express fewer attention units",
    "gptj": "stock gptj cannot express fewer attention units",
    "olmo2": "this attention has no KV heads that can leave",
    "olmo3": "this attention has no KV heads that can leave",
    "stablelm": "stock stablelm cannot express fewer attention units",
}
"""Types whose attention keeps its heads -> how that is said."""


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of this type with few and small blocks."""
    own = {**TINY_DECODERS.get(model_type, {}), **DESCRIBED.get(model_type, {}), **OTHERS.get(model_type, {})}
    return CONFIG_MAPPING[model_type](**{**SIZES, **own, **changes})


def save_decoder(model_type: str, directory: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random model of this type with a byte tokenizer. Weights are scaled up so that channels differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
    spread_weights(model)
    model.to(dtype).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory
