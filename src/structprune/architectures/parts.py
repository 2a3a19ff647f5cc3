"""Unit groups that several families share: gated MLPs and grouped-query attention with maps of their own.

Channel j of the MLP is gate row j, up row j and down column j. KV group k is k/v rows [k hd, (k+1) hd) with the q rows
and o columns of its g query heads, [k g hd, (k+1) g hd). Query-head unit u is the u-th query head of every KV group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PretrainedConfig

from structprune.errors import UnsupportedError
from structprune.types import AxisSlice, HeadUnits, UnitGroup


def head_size(config: PretrainedConfig) -> int:
    """Dimensions of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def queries_per_group(config: PretrainedConfig) -> int:
    """Query heads that share a KV head."""
    return config.num_attention_heads // config.num_key_value_heads


def head_slices(config: PretrainedConfig, head_units: HeadUnits) -> tuple[AxisSlice, AxisSlice]:
    """What a unit owns of the query heads, and of the KV heads: slices without a tensor, along axis 0.

    Raises UnsupportedError where a query head cannot leave without its KV head.
    """
    head_dim, queries = head_size(config), queries_per_group(config)
    shared = AxisSlice(tensor="", axis=0, width=head_dim)
    if head_units == "kv-group":
        return replace(shared, width=queries * head_dim), shared
    if queries == 1:
        raise UnsupportedError("every KV head has one query head", wanted="--head-units kv-group")
    # One query head of every group: stock attention wants as many in each.
    return replace(shared, repeat=config.num_key_value_heads, stride=queries * head_dim), shared


def attention_units(
    config: PretrainedConfig,
    head_units: HeadUnits,
    *,
    producers: Sequence[AxisSlice],
    norms: tuple[str, ...],
    biased_output: bool = False,
    bias_field: str | None = None,
    bias_modules: Sequence[str] = (),
    output_norm_eps: float | None = None,
) -> UnitGroup:
    """The group whose consumer is `self_attn.o_proj`, with the given producers."""
    queries = head_slices(config, head_units)[0]
    return UnitGroup(
        kind="attention",
        num_units=config.num_key_value_heads if head_units == "kv-group" else queries_per_group(config),
        width=queries.width * queries.repeat,
        producers=tuple(producers),
        consumer=replace(queries, tensor="self_attn.o_proj.weight", axis=1),
        consumer_module="self_attn.o_proj",
        consumer_bias="self_attn.o_proj.bias" if biased_output else None,
        config_fields=(
            {"num_key_value_heads": 1, "num_attention_heads": queries_per_group(config)}
            if head_units == "kv-group"
            else {"num_attention_heads": config.num_key_value_heads}
        ),
        module_prefix="self_attn.",
        bias_field=bias_field,
        bias_modules=tuple(bias_modules),
        norm_modules=norms,
        output_norm_eps=output_norm_eps,
    )


def grouped_attention(
    config: PretrainedConfig,
    head_units: HeadUnits,
    *,
    norms: tuple[str, ...],
    biased_inputs: bool = False,
    biased_output: bool = False,
    bias_field: str | None = None,
    output_norm_eps: float | None = None,
) -> UnitGroup:
    """Attention with q_proj, k_proj, v_proj and o_proj. `bias_field` is the config entry that gives all four a bias."""
    queries, shared = head_slices(config, head_units)
    parts = ("weight", "bias") if biased_inputs else ("weight",)
    owned = {"q_proj": queries} | ({"k_proj": shared, "v_proj": shared} if head_units == "kv-group" else {})
    return attention_units(
        config,
        head_units,
        producers=[
            replace(heads, tensor=f"self_attn.{module}.{part}") for module, heads in owned.items() for part in parts
        ],
        norms=norms,
        biased_output=biased_output,
        bias_field=bias_field,
        bias_modules=[f"self_attn.{module}" for module in ("q_proj", "k_proj", "v_proj", "o_proj")],
        output_norm_eps=output_norm_eps,
    )


def gated_mlp(
    num_channels: int,
    activation: str,
    *,
    norms: tuple[str, ...],
    biased: bool = False,
    bias_field: str | None = None,
    output_norm_eps: float | None = None,
) -> UnitGroup:
    """The MLP down_proj(activation(gate_proj x) * up_proj x)."""
    modules = ("mlp.gate_proj", "mlp.up_proj")
    return UnitGroup(
        kind="mlp",
        num_units=num_channels,
        width=1,
        producers=tuple(
            AxisSlice(tensor=f"{module}.{part}", axis=0)
            for module in modules
            for part in (("weight", "bias") if biased else ("weight",))
        ),
        consumer=AxisSlice(tensor="mlp.down_proj.weight", axis=1),
        consumer_module="mlp.down_proj",
        consumer_bias="mlp.down_proj.bias" if biased else None,
        config_fields={"intermediate_size": 1},
        module_prefix="mlp.",
        bias_field=bias_field,
        bias_modules=(*modules, "mlp.down_proj"),
        up_module="mlp.up_proj",
        gate_module="mlp.gate_proj",
        activation=activation,
        norm_modules=norms,
        output_norm_eps=output_norm_eps,
    )
