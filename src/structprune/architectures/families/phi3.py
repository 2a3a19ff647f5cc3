"""Phi-3 and Phi-4: the block of LLaMA with fused maps.

`qkv_proj` holds all queries, then all keys, then all values; `gate_up_proj` all gates, then all ups. Gate and up are no
maps of their own, so solvers that move them are refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from structprune.architectures.families.common import attention_units, head_size, head_slices, no_value_channels
from structprune.architectures.families.llama import NORMS, LlamaLike
from structprune.architectures.family import StockClasses
from structprune.errors import UnsupportedError
from structprune.types import AxisSlice, HeadUnits, UnitGroup


def _groups(config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
    channels = config.intermediate_size
    mlp = UnitGroup(
        kind="mlp",
        num_units=channels,
        width=1,
        producers=tuple(AxisSlice(tensor="mlp.gate_up_proj.weight", axis=0, offset=offset) for offset in (0, channels)),
        consumer=AxisSlice(tensor="mlp.down_proj.weight", axis=1),
        consumer_module="mlp.down_proj",
        config_fields={"intermediate_size": 1},
        module_prefix="mlp.",
        activation=config.hidden_act,
        norm_modules=NORMS["mlp"],
    )
    no_value_channels(head_units, "Phi-3", "--head-units kv-group or query-head")
    queries, shared = head_slices(config, head_units, head_size(config))
    fused = "self_attn.qkv_proj.weight"
    producers = [replace(queries, tensor=fused)]
    if head_units == "kv-group":
        keys = config.num_attention_heads * head_size(config)
        values = keys + config.num_key_value_heads * head_size(config)
        producers += [replace(shared, tensor=fused, offset=offset) for offset in (keys, values)]
    attention = attention_units(config, head_units, producers=producers, norms=NORMS["attention"])
    return (mlp, attention)


def _resized(config: dict[str, Any]) -> dict[str, Any]:
    """Refuse factors for long texts that Phi3Config would: it compares them with hidden_size // num_attention_heads.

    It does so even where head_dim is set.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factors = rope.get("short_factor")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    expected = int(config["hidden_size"] // config["num_attention_heads"] * share) // 2
    if factors and len(factors) != expected:
        raise UnsupportedError(
            "stock phi3 takes no other number of heads together with factors for long texts",
            got=f"{config['num_attention_heads']} heads, {len(factors)} factors",
            wanted=f"{expected} factors",
            do="use --structure per-layer",
        )
    return config


PHI3 = LlamaLike(
    name="phi3",
    attention_reads_widths=True,
    classes={
        "phi3": StockClasses(
            module="phi3", stem="Phi3", layer="Phi3DecoderLayer", chain=("Phi3Model", "Phi3ForCausalLM")
        )
    },
    groups=_groups,
    resized=_resized,
)
