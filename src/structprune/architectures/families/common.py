"""Unit groups that several families share: gated MLPs and grouped-query attention with maps of their own.

Channel j of the MLP is gate row j, up row j and down column j. KV group k is k/v rows [k hd, (k+1) hd) with the q rows
and o columns of its g query heads, [k g hd, (k+1) g hd). Query-head unit u is the u-th query head of every KV group.
Value channel j of KV head k is v row k hd + j and o columns (k g + i) hd + j for the group's query heads i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PretrainedConfig

from structprune.errors import UnsupportedError
from structprune.types import AxisSlice, HeadUnits, UnitGroup

VALUES_ENTRY = "v_head_dim"
"""Config entry of a block whose KV heads have lost value channels: as many are left in each."""
CHANNELS_ENTRY = "structprune_mlp_channels"
"""Config entry of a block whose MLP has lost channels where stock code derives their number: as many are left."""


def head_size(config: PretrainedConfig) -> int:
    """Return the dimensions of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def value_size(config: PretrainedConfig) -> int:
    """Return the channels of one KV head's values."""
    return getattr(config, VALUES_ENTRY, None) or head_size(config)


def queries_per_group(config: PretrainedConfig) -> int:
    """Return the number of query heads that share a KV head."""
    return config.num_attention_heads // config.num_key_value_heads


def head_slices(config: PretrainedConfig, head_units: HeadUnits, size: int) -> tuple[AxisSlice, AxisSlice]:
    """Return what a unit owns of the query heads, and of the KV heads: slices without a tensor, along axis 0.

    `size` is that of a head along this axis. Raises UnsupportedError where a query head cannot leave without its KV
    head.
    """
    queries = queries_per_group(config)
    shared = AxisSlice(tensor="", axis=0, width=size)
    if head_units == "kv-group":
        return replace(shared, width=queries * size), shared
    if head_units == "value-channel":
        channel = replace(shared, width=1)
        return replace(channel, repeat=queries, stride=size, run=size, gap=(queries - 1) * size), channel
    if queries == 1:
        raise UnsupportedError("every KV head has one query head", wanted="--head-units kv-group")
    # One query head of every group: stock attention wants as many in each.
    return replace(shared, repeat=config.num_key_value_heads, stride=queries * size), shared


def no_value_channels(head_units: HeadUnits, family: str, do: str) -> None:
    """Raise UnsupportedError if the units are value channels, for a family without a layer that has fewer of them."""
    if head_units == "value-channel":
        raise UnsupportedError(
            f"no layer of {family} with fewer value channels is described",
            got="--head-units value-channel",
            wanted=do,
        )


def only_kv_groups(head_units: HeadUnits, family: str) -> None:
    """Raise UnsupportedError for units of attention that families with as many KV heads as query heads do not have."""
    no_value_channels(head_units, family, "--scope mlp")
    if head_units == "query-head":
        raise UnsupportedError(f"{family} has one query head per KV head", wanted="--head-units kv-group")


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
    """Build the group whose consumer is `self_attn.o_proj`, with these producers."""
    heads, queries, values = config.num_key_value_heads, queries_per_group(config), value_size(config)
    read = head_slices(config, head_units, values)[0]
    num_units = {"kv-group": heads, "query-head": queries, "value-channel": heads * values}
    fields = {
        "kv-group": {"num_key_value_heads": 1, "num_attention_heads": queries},
        "query-head": {"num_attention_heads": heads},
        "value-channel": {VALUES_ENTRY: 1},
    }
    return UnitGroup(
        kind="attention",
        num_units=num_units[head_units],
        width=read.width * read.repeat,
        partitions=heads if head_units == "value-channel" else 1,
        producers=tuple(producers),
        consumer=replace(read, tensor="self_attn.o_proj.weight", axis=1),
        consumer_module="self_attn.o_proj",
        consumer_bias="self_attn.o_proj.bias" if biased_output else None,
        config_fields=fields[head_units],
        fixed_fields={VALUES_ENTRY if head_units == "value-channel" else "head_dim": head_size(config)},
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
    """Build attention with q_proj, k_proj, v_proj and o_proj; the config entry `bias_field` gives all four a bias."""
    queries, shared = head_slices(config, head_units, head_size(config))
    values = head_slices(config, head_units, value_size(config))[1]
    parts = ("weight", "bias") if biased_inputs else ("weight",)
    modules = {
        "kv-group": {"q_proj": queries, "k_proj": shared, "v_proj": values},
        "query-head": {"q_proj": queries},
        "value-channel": {"v_proj": values},
    }
    return attention_units(
        config,
        head_units,
        producers=[
            replace(heads, tensor=f"self_attn.{module}.{part}")
            for module, heads in modules[head_units].items()
            for part in parts
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
    """Build the MLP down_proj(activation(gate_proj x) * up_proj x)."""
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
