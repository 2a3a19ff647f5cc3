"""Gemma 2 and 3 (text): LLaMA's maps, norms before and behind each sublayer, scaled embeddings, windows in some blocks.

What a sublayer adds to the stream is the norm of its consumer's output. Gemma 2 caps its logits, those of attention
too, which SDPA cannot; Gemma 3 norms queries and keys over the dimensions of a head and turns windowed blocks with
another frequency. Norms multiply by 1 + weight; nothing here folds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from structprune.architectures.families.common import gated_mlp, grouped_attention
from structprune.architectures.families.llama import VALUE_MAPS
from structprune.architectures.family import Family, StockClasses
from structprune.errors import UnsupportedError
from structprune.types import HeadUnits, SublayerKind, UnitGroup

_NORMS: Mapping[SublayerKind, tuple[str, ...]] = {
    "attention": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


def _check(config: PretrainedConfig) -> None:
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedError(
            "a Gemma whose tokens see later ones is no causal model", wanted="use_bidirectional_attention: false"
        )


def _groups(config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
    return (
        gated_mlp(
            config.intermediate_size, config.hidden_activation, norms=_NORMS["mlp"], output_norm_eps=config.rms_norm_eps
        ),
        grouped_attention(
            config,
            head_units,
            norms=_NORMS["attention"],
            biased_inputs=config.attention_bias,
            biased_output=config.attention_bias,
            bias_field="attention_bias",
            output_norm_eps=config.rms_norm_eps,
        ),
    )


def _resized(config: dict[str, Any]) -> dict[str, Any]:
    """Refuse heads that do not divide hidden_size, as Gemma's configs do even where head_dim is set."""
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UnsupportedError(
            "stock Gemma takes no number of heads that does not divide the hidden size",
            got=f"{config['num_attention_heads']} heads, hidden_size {config['hidden_size']}",
            do="use --structure per-layer",
        )
    return config


def _embedding_scale(config: PretrainedConfig) -> Mapping[str, float]:
    return {"model.embed_tokens.embed_scale": config.hidden_size**0.5}


GEMMA2 = Family(
    name="gemma2",
    blocks_module="model.layers",
    embedding_modules=("model.embed_tokens",),
    embedding_buffers=_embedding_scale,
    rotary_module="model.rotary_emb",
    final_norm_module="model.norm",
    head_module="lm_head",
    logit_entries=("final_logit_softcapping",),
    attention_module="self_attn",
    attention_implementation="eager",
    mlp_modules=("mlp",),
    norms=_NORMS,
    classes={
        "gemma2": StockClasses(
            module="gemma2", stem="Gemma2", layer="Gemma2DecoderLayer", chain=("Gemma2Model", "Gemma2ForCausalLM")
        )
    },
    groups=_groups,
    value_maps=VALUE_MAPS,
    check=_check,
    resized=_resized,
)

GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    attention_implementation="sdpa",
    classes={
        "gemma3_text": StockClasses(
            module="gemma3", stem="Gemma3", layer="Gemma3DecoderLayer", chain=("Gemma3TextModel", "Gemma3ForCausalLM")
        )
    },
)
