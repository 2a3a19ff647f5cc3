"""Tiny decoders without a family file that tracing describes, and how they are written to disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from support.decoders import HEADS, LATENT, OLD, SIZES, TINY_DECODERS
from support.models import byte_tokenizer, spread_weights

WINDOWS: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
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
OTHERS: Mapping[str, dict[str, Any]] = {
    "codegen": {**OLD, "n_embd": 32, "n_inner": 48, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "minicpm3": LATENT,
    "ministral": HEADS,
    "openai-gpt": {**OLD, "n_embd": 32},
    "youtu": LATENT,
}
"""More types that the common sizes alone do not build."""
TRACED = (
    *("apertus", "arcee", "biogpt", "codegen", "cohere", "cwm", "diffllama", "ernie4_5", "glm", "gpt_bigcode"),
    *("granite_swa", "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "jais2", "minicpm3"),
    *("ministral", "nanochat", "olmo", "persimmon", "seed_oss", "vaultgemma", "youtu"),
)
"""Types that are described beside these, for the slow tests."""
OWN_MLP = ("bloom", "mpt")
"""Types whose MLPs lose channels by our modelling file alone."""
HELD_HEADS = {
    **dict.fromkeys(("bloom", "deepseek_v3", "mpt"), "cannot express fewer attention"),
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
