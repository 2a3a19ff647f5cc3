"""LLaMA 1-3, SmolLM2, Mistral: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Channel j of the MLP is gate row j, up row j and down column j. KV group k is k/v rows [k hd, (k+1) hd) with the q rows
and o columns of its g query heads, [k g hd, (k+1) g hd). Query-head unit u is the u-th query head of every KV group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from structprune.architectures.family import Family, Stream, StreamHalf
from structprune.errors import UnsupportedError
from structprune.types import AxisSlice, HeadUnits, UnitGroup


def _head_slices(
    num_kv: int, queries_per_group: int, head_dim: int, head_units: HeadUnits
) -> tuple[AxisSlice, AxisSlice]:
    """What a unit owns of the query heads, and of the KV heads."""
    shared = AxisSlice(tensor="", axis=0, width=head_dim)
    if head_units == "kv-group":
        return AxisSlice(tensor="", axis=0, width=queries_per_group * head_dim), shared
    if queries_per_group == 1:
        raise UnsupportedError("every KV head has one query head", wanted="--head-units kv-group")
    # One query head of every group: stock attention wants as many in each.
    return AxisSlice(tensor="", axis=0, width=head_dim, repeat=num_kv, stride=queries_per_group * head_dim), shared


def _groups(config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
    num_kv = config.num_key_value_heads
    queries_per_group = config.num_attention_heads // num_kv
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    mlp_parts = ["weight", "bias"] if getattr(config, "mlp_bias", False) else ["weight"]
    attention_parts = ["weight", "bias"] if getattr(config, "attention_bias", False) else ["weight"]
    mlp = UnitGroup(
        kind="mlp",
        num_units=config.intermediate_size,
        width=1,
        producers=tuple(
            AxisSlice(tensor=f"mlp.{module}.{part}", axis=0)
            for module in ("gate_proj", "up_proj")
            for part in mlp_parts
        ),
        consumer=AxisSlice(tensor="mlp.down_proj.weight", axis=1),
        consumer_module="mlp.down_proj",
        consumer_bias="mlp.down_proj.bias" if len(mlp_parts) == 2 else None,
        config_fields={"intermediate_size": 1},
        module_prefix="mlp.",
        bias_field="mlp_bias" if config.model_type == "llama" else None,
        bias_modules=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        up_module="mlp.up_proj",
        gate_module="mlp.gate_proj",
        activation=config.hidden_act,
        norm_modules=("post_attention_layernorm",),
    )
    modules = ["q_proj", "k_proj", "v_proj"] if head_units == "kv-group" else ["q_proj"]
    queries, shared = _head_slices(num_kv, queries_per_group, head_dim, head_units)
    attention = UnitGroup(
        kind="attention",
        num_units=num_kv if head_units == "kv-group" else queries_per_group,
        width=queries.width * queries.repeat,
        producers=tuple(
            replace(queries if module == "q_proj" else shared, tensor=f"self_attn.{module}.{part}")
            for module in modules
            for part in attention_parts
        ),
        consumer=replace(queries, tensor="self_attn.o_proj.weight", axis=1),
        consumer_module="self_attn.o_proj",
        consumer_bias="self_attn.o_proj.bias" if len(attention_parts) == 2 else None,
        config_fields=(
            {"num_key_value_heads": 1, "num_attention_heads": queries_per_group}
            if head_units == "kv-group"
            else {"num_attention_heads": num_kv}
        ),
        module_prefix="self_attn.",
        bias_field="attention_bias" if config.model_type == "llama" else None,
        bias_modules=tuple(f"self_attn.{module}" for module in ("q_proj", "k_proj", "v_proj", "o_proj")),
        norm_modules=("input_layernorm",),
    )
    return (mlp, attention)


def _resized(config: dict[str, Any]) -> dict[str, Any]:
    """LlamaConfig wants hidden_size to be a multiple of the number of heads, even where head_dim is given.

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
    return config | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


LLAMA = Family(
    name="llama",
    blocks_module="model.layers",
    embedding_modules=("model.embed_tokens",),
    rotary_module="model.rotary_emb",
    final_norm_module="model.norm",
    head_module="lm_head",
    attention_module="self_attn",
    mlp_modules=("mlp",),
    groups=_groups,
    stream=Stream(
        halves=(
            StreamHalf(
                kind="attention",
                norm="input_layernorm",
                readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                writer="self_attn.o_proj",
            ),
            StreamHalf(
                kind="mlp",
                norm="post_attention_layernorm",
                readers=("mlp.gate_proj", "mlp.up_proj"),
                writer="mlp.down_proj",
            ),
        ),
        eps_field="rms_norm_eps",
    ),
    resized=_resized,
)
