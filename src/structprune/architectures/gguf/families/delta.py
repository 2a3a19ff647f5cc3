"""Blocks that attend by a gated delta rule, all but every fourth: Qwen 3 Next, a mixture, and Qwen 3.5.

A checkpoint has queries, keys, values and gates of one key head after the other; the file those of all heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from structprune.architectures.gguf.description import (
    Entry,
    GgufFamily,
    GgufModel,
    GgufReading,
    Rule,
    Target,
    Value,
    of_kind,
)
from structprune.architectures.gguf.entries import HEAD_SIZE, RMS_EPSILON, constants, rotary, whole
from structprune.architectures.gguf.families.llama import GATED
from structprune.architectures.gguf.families.mixtures import CHOSEN, shared_expert, shared_gate, stacked_apart
from structprune.architectures.gguf.rules import (
    attention,
    bare,
    ends,
    expert_maps,
    gated_mlp,
    head_norms,
    norm,
    router,
    shifted,
)
from structprune.errors import UnsupportedError

_LINEAR, _FULL = "linear_attention", "full_attention"


def _delta(source: str, target: str, dims: tuple[str, ...], **more: Any) -> Rule:
    return Rule(source=f"linear_attn.{source}", target=target, dims=dims, **more)


_QUERIES = tuple(
    replace(rule, dims=("2q", "d")) if rule.source.startswith("self_attn.q_proj") else rule
    for rule in bare(attention())
)
_MIXED = _delta(
    "in_proj_qkvz.weight",
    "attn_qkv.weight",
    ("qkvz", "d"),
    stored_dims=("qkv", "d"),
    transform="delta-states",
    rows="front",
)
_RULE = (
    _MIXED,
    replace(_MIXED, target="attn_gate.weight", stored_dims=("values", "d"), transform="delta-gates", rows="back"),
    _delta("in_proj_ba.weight", "ssm_ba.weight", ("2t", "d")),
    _delta("conv1d.weight", "ssm_conv1d.weight", ("qkv", "1", "kernel"), stored_dims=("qkv", "kernel"), float32=True),
    _delta("dt_bias", "ssm_dt.bias", ("t",)),
    _delta("A_log", "ssm_a", ("t",), transform="minus-exp"),
    _delta("norm.weight", "ssm_norm.weight", ("hv",)),
    _delta("out_proj.weight", "ssm_out.weight", ("d", "values")),
)


def _dims(config: Any) -> dict[str, int]:
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    return {
        "1": 1,
        "2q": 2 * config.num_attention_heads * config.head_dim,
        "groups": keys,
        "hk": key,
        "hv": value,
        "values": values * value,
        "qkv": 2 * keys * key + values * value,
        "states": 2 * keys * key,
        "qkvz": 2 * keys * key + 2 * values * value,
        "t": values,
        "2t": 2 * values,
        "kernel": config.linear_conv_kernel_dim,
        "s": getattr(config, "shared_expert_intermediate_size", 0),
    }


def _read(reading: GgufReading) -> dict[str, Any]:
    fields, blocks = reading.fields, reading.sizes.blocks
    period = fields.integer("full_attention_interval", 4)
    values, inner = fields.integer("ssm.time_step_rank"), fields.integer("ssm.inner_size")
    return {
        "linear_conv_kernel_dim": fields.integer("ssm.conv_kernel"),
        "linear_key_head_dim": fields.integer("ssm.state_size"),
        "linear_num_key_heads": fields.integer("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_value_head_dim": max(1, inner // values),
        "layer_types": [_FULL if (index + 1) % period == 0 else _LINEAR for index in range(blocks)],
    }


def _write(model: GgufModel) -> dict[str, Value]:
    config, types = model.config, model.layer_types()
    period = types.index(_FULL) + 1 if _FULL in types else len(types) + 1
    if types != [_FULL if (index + 1) % period == 0 else _LINEAR for index in range(len(types))]:
        raise UnsupportedError(
            f"llama.cpp's {model.target.architecture} attends in equally spaced blocks",
            got=f"layer_types {types}",
            do="export a model that has lost no blocks",
        )
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise UnsupportedError(
            f"llama.cpp's {model.target.architecture} has keys and values of one size in its recurrence",
            got=f"{config.linear_key_head_dim} and {config.linear_value_head_dim}",
        )
    return {
        "ssm.conv_kernel": int(config.linear_conv_kernel_dim),
        "ssm.state_size": int(config.linear_key_head_dim),
        "ssm.group_count": int(config.linear_num_key_heads),
        "ssm.time_step_rank": int(config.linear_num_value_heads),
        "ssm.inner_size": int(config.linear_num_value_heads * config.linear_value_head_dim),
        "full_attention_interval": period,
    }


def _block(rule: tuple[Rule, ...], mlp: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (
        *shifted((norm(None, "input_layernorm", "attn_norm"),)),
        *of_kind(_FULL, (*_QUERIES, *shifted(head_norms()))),
        *of_kind(_LINEAR, rule),
        *shifted((norm("mlp", "post_attention_layernorm", "post_attention_norm"),)),
        *mlp,
    )


_MIXTURE = (
    router("mlp.gate"),
    *expert_maps("mlp.experts"),
    *shared_expert("mlp.shared_expert"),
    shared_gate("mlp.shared_expert_gate"),
)
_QWEN3_NEXT = Target(
    architecture="qwen3next",
    outer=shifted(ends()),
    block=_block(_RULE, _MIXTURE),
    entries=(
        RMS_EPSILON,
        HEAD_SIZE,
        rotary(partial=True),
        CHOSEN,
        whole("feed_forward_length", "intermediate_size", 1),
        whole("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        Entry(read=_read, write=_write),
        constants({"attention_bias": False}),
    ),
    width_key="expert_feed_forward_length",
)

# Its projections are apart, and its value heads in another order.
_TILED_RULE = (
    _delta("in_proj_qkv.weight", "attn_qkv.weight", ("qkv", "d"), tiled="rows"),
    _delta("in_proj_z.weight", "attn_gate.weight", ("values", "d"), tiled="rows"),
    _delta("in_proj_b.weight", "ssm_beta.weight", ("t", "d"), tiled="rows"),
    _delta("in_proj_a.weight", "ssm_alpha.weight", ("t", "d"), tiled="rows"),
    *(
        replace(rule, tiled="columns" if rule.source.endswith("out_proj.weight") else "rows")
        for rule in _RULE
        if rule.source.endswith(("conv1d.weight", "dt_bias", "A_log", "out_proj.weight"))
    ),
    _delta("norm.weight", "ssm_norm.weight", ("hv",)),
)


def _sections() -> Entry:
    """Build the rotary entry of a model that can also look: where height and width are, which text does not ask."""
    turned, key = rotary(partial=True), "rope.dimension_sections"

    def read(reading: GgufReading) -> dict[str, Any]:
        found = reading.fields.raw(key)
        sections = [11, 11, 10] if found is None else [int(each) for each in list(found)[:3]]
        parameters = turned.read(reading)["rope_parameters"]
        return {"rope_parameters": {**parameters, "mrope_section": sections, "mrope_interleaved": True}}

    def write(model: GgufModel) -> dict[str, Value]:
        sections = model.config.rope_parameters.get("mrope_section") or [11, 11, 10]
        return {**turned.write(model), key: [*map(int, sections), 0]}

    return Entry(read=read, write=write)


_QWEN35 = Target(
    architecture="qwen35",
    outer=shifted(ends()),
    block=_block(_TILED_RULE, bare(gated_mlp())),
    entries=(
        RMS_EPSILON,
        HEAD_SIZE,
        _sections(),
        Entry(read=_read, write=_write),
        constants({"attention_bias": False}),
    ),
)

_QWEN35_MOE = replace(
    _QWEN35,
    architecture="qwen35moe",
    block=_block(_TILED_RULE, _MIXTURE),
    entries=(
        *_QWEN35.entries,
        CHOSEN,
        whole("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ),
    width_key="expert_feed_forward_length",
)

_FAMILY = replace(
    GATED, window="any", dims=_dims, kinds=lambda config: [frozenset({kind}) for kind in config.layer_types]
)
_MIXTURE_FAMILY = replace(
    _FAMILY,
    uniform=_QWEN3_NEXT,
    widths={"f": ("mlp.experts.0.up_proj.weight", 0)},
    names={"intermediate_size": "moe_intermediate_size"},
    stacking=stacked_apart("mlp.experts"),
)
DELTA: Mapping[str, GgufFamily] = {
    "qwen3_next": replace(
        _MIXTURE_FAMILY, requires={"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}
    ),
    "qwen3_5_text": replace(_FAMILY, uniform=_QWEN35, widths={"f": ("mlp.up_proj.weight", 0)}),
    "qwen3_5_moe_text": replace(_MIXTURE_FAMILY, uniform=_QWEN35_MOE),
}
"""`config.model_type` -> its description."""
