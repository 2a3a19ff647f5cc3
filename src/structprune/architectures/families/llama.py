"""LLaMA 1-3, SmolLM2, Mistral: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import transformers
from transformers import LlamaConfig, MistralConfig, PretrainedConfig

from structprune.architectures.families.common import gated_mlp, grouped_attention
from structprune.architectures.family import Family, StockClasses, Stream, StreamSublayer
from structprune.errors import UnsupportedError
from structprune.types import HeadUnits, SublayerKind, UnitGroup

VALUE_MAPS = ("self_attn.v_proj", "self_attn.o_proj")
NORMS: Mapping[SublayerKind, tuple[str, ...]] = {
    "attention": ("input_layernorm",),
    "mlp": ("post_attention_layernorm",),
}
STREAM = Stream(
    sublayers=(
        StreamSublayer(
            kind="attention",
            norm="input_layernorm",
            readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            writer="self_attn.o_proj",
        ),
        StreamSublayer(
            kind="mlp",
            norm="post_attention_layernorm",
            readers=("mlp.gate_proj", "mlp.up_proj"),
            writer="mlp.down_proj",
        ),
    ),
    eps_field="rms_norm_eps",
)


def _groups(config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
    biased_attention = bool(getattr(config, "attention_bias", False))
    mlp = gated_mlp(
        config.intermediate_size,
        config.hidden_act,
        norms=NORMS["mlp"],
        biased=bool(getattr(config, "mlp_bias", False)),
        bias_field="mlp_bias" if config.model_type == "llama" else None,
    )
    attention = grouped_attention(
        config,
        head_units,
        norms=NORMS["attention"],
        biased_inputs=biased_attention,
        biased_output=biased_attention,
        bias_field="attention_bias" if config.model_type == "llama" else None,
    )
    return (mlp, attention)


# Entries that both classes have, none of which follows from another.
_DEFAULTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("tie_word_embeddings", "attention_dropout"),
)


def _resized(config: dict[str, Any]) -> dict[str, Any]:
    """Use Mistral's class for heads that do not divide hidden_size: LlamaConfig refuses them, even with a head_dim.

    Mistral's is the same block (no biases, here without a window) without that check.
    """
    if config["model_type"] != "llama" or config["hidden_size"] % config["num_attention_heads"] == 0:
        return config
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UnsupportedError(
                "no stock class takes this number of heads together with biases",
                got=f"{config['num_attention_heads']} heads, hidden_size {config['hidden_size']}, {name}",
                do="use --structure per-layer",
            )
    own, other = LlamaConfig().to_dict(), MistralConfig().to_dict()
    # What the config leaves out means what LLaMA's class takes for it, not Mistral's.
    meant = {name: own[name] for name in _DEFAULTS if name not in config and own[name] != other[name]}
    return {
        **config,
        **meant,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        # An older version makes transformers take the tokenizer for one of Mistral's early ones, and warn.
        "transformers_version": transformers.__version__,
    }


LlamaLike = partial(
    Family,
    blocks_module="model.layers",
    embedding_modules=("model.embed_tokens",),
    rotary_module="model.rotary_emb",
    final_norm_module="model.norm",
    head_module="lm_head",
    attention_module="self_attn",
    mlp_modules=("mlp",),
    norms=NORMS,
)
"""A Family whose modules have the names and places of LLaMA's; what else there is to say is given."""

LLAMA = LlamaLike(
    name="llama",
    classes={
        "llama": StockClasses(
            module="llama", stem="Llama", layer="LlamaDecoderLayer", chain=("LlamaModel", "LlamaForCausalLM")
        ),
        "mistral": StockClasses(
            module="mistral", stem="Mistral", layer="MistralDecoderLayer", chain=("MistralModel", "MistralForCausalLM")
        ),
    },
    groups=_groups,
    value_maps=VALUE_MAPS,
    stream=STREAM,
    resized=_resized,
)
