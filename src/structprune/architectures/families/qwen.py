"""Qwen 2, 2.5 and 3: the block of LLaMA with a window of attention in some blocks.

Qwen 2 has biases on q, k and v alone. Qwen 3 has none and norms queries and keys over the dimensions of a head, with
one weight for all heads: these norms belong to no unit. They share the config's epsilon with the norms of the stream,
which slicing changes, so that the stream of Qwen 3 is not described.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from structprune.architectures.families.common import gated_mlp, grouped_attention
from structprune.architectures.families.llama import NORMS, STREAM, VALUE_MAPS, LlamaLike
from structprune.architectures.family import StockClasses
from structprune.types import HeadUnits, UnitGroup


def _qwen2_groups(config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
    return (
        gated_mlp(config.intermediate_size, config.hidden_act, norms=NORMS["mlp"]),
        grouped_attention(config, head_units, norms=NORMS["attention"], biased_inputs=True),
    )


def qwen3_attention(config: PretrainedConfig, head_units: HeadUnits) -> UnitGroup:
    """Build Qwen3's attention, whose norms of queries and keys stay whole: no unit owns any of them."""
    return grouped_attention(
        config,
        head_units,
        norms=NORMS["attention"],
        biased_inputs=config.attention_bias,
        biased_output=config.attention_bias,
        bias_field="attention_bias",
    )


def _qwen3_groups(config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
    return (
        gated_mlp(config.intermediate_size, config.hidden_act, norms=NORMS["mlp"]),
        qwen3_attention(config, head_units),
    )


QWEN2 = LlamaLike(
    name="qwen2",
    classes={
        "qwen2": StockClasses(
            module="qwen2", stem="Qwen2", layer="Qwen2DecoderLayer", chain=("Qwen2Model", "Qwen2ForCausalLM")
        )
    },
    groups=_qwen2_groups,
    value_maps=VALUE_MAPS,
    stream=STREAM,
)

QWEN3 = LlamaLike(
    name="qwen3",
    classes={
        "qwen3": StockClasses(
            module="qwen3", stem="Qwen3", layer="Qwen3DecoderLayer", chain=("Qwen3Model", "Qwen3ForCausalLM")
        )
    },
    groups=_qwen3_groups,
    value_maps=VALUE_MAPS,
)
