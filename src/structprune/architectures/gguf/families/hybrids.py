"""Hybrids: attention and a recurrence of Mamba in one block, or in turns.

Falcon-H1's factors are multiplied into the weights of a file, which says none of them: its config has ones for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

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
from structprune.architectures.gguf.entries import RMS_EPSILON, constants, whole
from structprune.architectures.gguf.families.llama import GATED, USUAL
from structprune.architectures.gguf.families.mixtures import CHOSEN, stacked_apart
from structprune.architectures.gguf.rules import (
    SEPARATE_WIDTHS,
    attention,
    bare,
    ends,
    expert_maps,
    gated_mlp,
    norm,
    router,
)
from structprune.errors import UnsupportedError

STATE_SIZES = (
    whole("ssm.conv_kernel", "mamba_d_conv"),
    whole("ssm.state_size", "mamba_d_state"),
)
"""Entries of a recurrence's kernel and states."""


def _mixer(source: str, target: str, dims: tuple[str, ...], **more: Any) -> Rule:
    return Rule(source=f"mamba.{source}", target=target, dims=dims, **more)


_CONVOLUTION = (
    _mixer("conv1d.weight", "ssm_conv1d.weight", ("c", "1", "kernel"), stored_dims=("c", "kernel"), float32=True),
    _mixer("conv1d.bias", "ssm_conv1d.bias", ("c",)),
)


def mamba2(*, normed: bool) -> tuple[Rule, ...]:
    """Return the rules of a recurrence of Mamba 2; `normed`: in all blocks, rather than in those of that kind."""
    gated = (_mixer("norm.weight", "ssm_norm.weight", ("i",), stored_dims=("g", "i/g"), float32=True),)
    return (
        _mixer("in_proj.weight", "ssm_in.weight", ("in", "d")),
        *_CONVOLUTION,
        _mixer("dt_bias", "ssm_dt.bias", ("t",)),
        _mixer("A_log", "ssm_a", ("t",), stored_dims=("t", "1"), transform="minus-exp", float32=True),
        _mixer("D", "ssm_d", ("t",), stored_dims=("t", "1"), float32=True),
        *(gated if normed else of_kind("normed", gated)),
        _mixer("out_proj.weight", "ssm_out.weight", ("d", "i")),
    )


def mixer_dims(inner: int, heads: int, groups: int, state: int, kernel: int) -> dict[str, int]:
    """Return the dimensions of a recurrence of Mamba 2, by its channels, heads, groups, states and kernel."""
    channels = inner + 2 * groups * state
    return {
        "1": 1,
        "i": inner,
        "c": channels,
        "in": inner + channels + heads,
        "t": heads,
        "kernel": kernel,
        "g": groups,
        "i/g": inner // groups,
    }


def _feed_forward(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(replace(rule, source=rule.source.replace("mlp.", "feed_forward.")) for rule in rules)


def _ssm_factors(config: Any) -> Tensor:
    """Return the factor of each row of Falcon-H1's input map: gate, values, two states, steps."""
    state = config.mamba_n_groups * config.mamba_d_state
    counts = (config.mamba_d_ssm, config.mamba_d_ssm, state, state, config.mamba_n_heads)
    rows = [torch.full((count,), value) for count, value in zip(counts, config.ssm_multipliers, strict=True)]
    return torch.cat(rows)[:, None] * config.ssm_in_multiplier


_FACTORS: Mapping[str, Callable[[Any], Any]] = {
    "model.embed_tokens": lambda config: config.embedding_multiplier,
    "lm_head": lambda config: config.lm_head_multiplier,
    "self_attn.q_proj": lambda config: config.attention_in_multiplier,
    "self_attn.k_proj": lambda config: config.attention_in_multiplier * config.key_multiplier,
    "self_attn.v_proj": lambda config: config.attention_in_multiplier,
    "self_attn.o_proj": lambda config: config.attention_out_multiplier,
    "feed_forward.gate_proj": lambda config: config.mlp_multipliers[0],
    "feed_forward.down_proj": lambda config: config.mlp_multipliers[1],
    "mamba.in_proj": _ssm_factors,
    "mamba.out_proj": lambda config: config.ssm_out_multiplier,
}


def _with_factors(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Give the rules the factors of their maps, the biases none, which llama.cpp adds as they are."""
    return tuple(replace(rule, factor=_FACTORS.get(rule.source.removesuffix(".weight"))) for rule in rules)


def _read_falcon(reading: GgufReading) -> dict[str, Any]:
    fields = reading.fields
    inner, heads = fields.integer("ssm.inner_size"), fields.integer("ssm.time_step_rank")
    return {
        "mamba_d_ssm": inner,
        "mamba_n_heads": heads,
        "mamba_d_head": max(1, inner // heads),
        "mamba_n_groups": fields.integer("ssm.group_count"),
        "mamba_rms_norm": fields.has_tensor("blk.0.ssm_norm.weight"),
    }


def _write_falcon(model: GgufModel) -> dict[str, Value]:
    config = model.config
    if config.tie_word_embeddings and config.embedding_multiplier != config.lm_head_multiplier:
        raise UnsupportedError(
            "llama.cpp's falcon-h1 has one embedding and head, and no factors of either",
            got=f"embedding_multiplier {config.embedding_multiplier}, lm_head_multiplier {config.lm_head_multiplier}",
        )
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        raise UnsupportedError("llama.cpp's falcon-h1 norms behind the gate", got="mamba_norm_before_gate true")
    if config.mamba_d_ssm is None or not config.mamba_conv_bias:
        raise UnsupportedError(
            "llama.cpp's falcon-h1 has a bias in its convolution", got=f"mamba_conv_bias {config.mamba_conv_bias}"
        )
    return {
        "ssm.inner_size": int(config.mamba_d_ssm),
        "ssm.time_step_rank": int(config.mamba_n_heads),
        "ssm.group_count": int(config.mamba_n_groups),
    }


def _falcon_dims(config: Any) -> dict[str, int]:
    return mixer_dims(
        config.mamba_d_ssm, config.mamba_n_heads, config.mamba_n_groups, config.mamba_d_state, config.mamba_d_conv
    )


def _falcon_kinds(config: Any) -> list[frozenset[str]]:
    return [frozenset({"normed"} if config.mamba_rms_norm else set())] * config.num_hidden_layers


_ONES = {
    **dict.fromkeys(
        (
            *("lm_head_multiplier", "embedding_multiplier", "key_multiplier", "attention_out_multiplier"),
            *("attention_in_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"),
        ),
        1.0,
    ),
    "mlp_multipliers": [1.0] * 2,
    "ssm_multipliers": [1.0] * 5,
}
_FALCON_H1 = Target(
    architecture="falcon-h1",
    outer=_with_factors(ends((norm(None, "model.final_layernorm", "output_norm"),))),
    block=_with_factors(
        (
            norm(None, "input_layernorm", "attn_norm"),
            *bare(attention()),
            *mamba2(normed=False),
            replace(norm("mlp", "pre_ff_layernorm", "ffn_norm"), target="ffn_norm"),
            *_feed_forward(bare(gated_mlp())),
        )
    ),
    entries=(
        *USUAL,
        *STATE_SIZES,
        Entry(read=_read_falcon, write=_write_falcon),
        constants(
            {
                **_ONES,
                "mamba_norm_before_gate": False,
                "mamba_conv_bias": True,
                "mamba_proj_bias": False,
                "projectors_bias": False,
                "attention_bias": False,
                "mlp_bias": False,
            }
        ),
    ),
)


def _jamba_kinds(config: Any) -> list[frozenset[str]]:
    experts = [
        "mixture" if count > 1 else "dense"
        for count in (
            config.num_experts if index % config.expert_layer_period == config.expert_layer_offset else 1
            for index in range(config.num_hidden_layers)
        )
    ]
    mixers = [
        "attention" if index % config.attn_layer_period == config.attn_layer_offset else "mamba"
        for index in range(config.num_hidden_layers)
    ]
    return [frozenset(pair) for pair in zip(experts, mixers, strict=True)]


def _jamba_dims(config: Any) -> dict[str, int]:
    inner = config.mamba_expand * config.hidden_size
    return {
        "1": 1,
        "c": inner,
        "2i": 2 * inner,
        "kernel": config.mamba_d_conv,
        "rank": config.mamba_dt_rank,
        "state": config.mamba_d_state,
        "x": config.mamba_dt_rank + 2 * config.mamba_d_state,
        "f": config.intermediate_size,
    }


def _steps(blocks: list[int], count: int, what: str, where: str) -> dict[str, int]:
    """Return period and offset of equally spaced blocks. Raises UnsupportedError for others."""
    period = blocks[1] - blocks[0] if len(blocks) > 1 else count
    offset = blocks[0] if blocks else count
    if blocks != list(range(offset, count, max(1, period))) or not blocks or offset >= period:
        raise UnsupportedError(
            f"stock code has {what} in equally spaced blocks", where=where, got=f"blocks {blocks} of {count}"
        )
    return {"period": period, "offset": offset}


def _read_jamba(reading: GgufReading) -> dict[str, Any]:
    fields, sizes = reading.fields, reading.sizes
    attends = [index for index in range(sizes.blocks) if fields.has_tensor(f"blk.{index}.attn_q.weight")]
    mixed = [index for index in range(sizes.blocks) if fields.has_tensor(f"blk.{index}.ffn_gate_inp.weight")]
    steps = _steps(attends, sizes.blocks, "attention", fields.where)
    # A model without a mixture has one expert everywhere, whatever the steps.
    experts = _steps(mixed, sizes.blocks, "experts", fields.where) if mixed else {"period": 1, "offset": 0}
    inner = fields.integer("ssm.inner_size")
    if inner % sizes.hidden:
        raise UnsupportedError("the recurrence is no multiple of the hidden size", where=fields.where, got=inner)
    return {
        "attn_layer_period": steps["period"],
        "attn_layer_offset": steps["offset"],
        "expert_layer_period": experts["period"],
        "expert_layer_offset": experts["offset"],
        "num_experts": sizes.experts or 1,
        "mamba_expand": inner // sizes.hidden,
        "mamba_dt_rank": fields.integer("ssm.time_step_rank"),
    }


def _write_jamba(model: GgufModel) -> dict[str, Value]:
    config = model.config
    if config.mamba_expand != 2 or not config.mamba_conv_bias or config.mamba_proj_bias:
        raise UnsupportedError(
            "llama.cpp's jamba has recurrences of twice the hidden size, with a bias in the convolution alone",
            got=f"mamba_expand {config.mamba_expand}, mamba_conv_bias {config.mamba_conv_bias}, "
            f"mamba_proj_bias {config.mamba_proj_bias}",
        )
    kinds = _jamba_kinds(config)
    heads = [block.kv_heads if "attention" in kinds[block.index] else 0 for block in model.blocks]
    return {
        "attention.head_count_kv": heads,
        "ssm.inner_size": int(config.mamba_expand * config.hidden_size),
        "ssm.time_step_rank": int(config.mamba_dt_rank),
    }


_JAMBA = Target(
    architecture="jamba",
    outer=ends((norm(None, "model.final_layernorm", "output_norm"),)),
    block=(
        norm(None, "input_layernorm", "attn_norm"),
        *of_kind("attention", bare(attention())),
        *of_kind(
            "mamba",
            (
                _mixer("in_proj.weight", "ssm_in.weight", ("2i", "d")),
                *_CONVOLUTION,
                _mixer("x_proj.weight", "ssm_x.weight", ("x", "c")),
                _mixer("dt_proj.weight", "ssm_dt.weight", ("c", "rank")),
                _mixer("dt_proj.bias", "ssm_dt.bias", ("c",)),
                _mixer("A_log", "ssm_a", ("c", "state"), transform="minus-exp", float32=True),
                _mixer("D", "ssm_d", ("c",)),
                _mixer("dt_layernorm.weight", "ssm_dt_norm.weight", ("rank",)),
                _mixer("b_layernorm.weight", "ssm_b_norm.weight", ("state",)),
                _mixer("c_layernorm.weight", "ssm_c_norm.weight", ("state",)),
                _mixer("out_proj.weight", "ssm_out.weight", ("d", "c")),
            ),
        ),
        norm("mlp", "pre_ff_layernorm", "ffn_norm"),
        *of_kind("dense", _feed_forward(bare(gated_mlp()))),
        *of_kind("mixture", (router("feed_forward.router"), *expert_maps("feed_forward.experts"))),
    ),
    entries=(
        RMS_EPSILON,
        *STATE_SIZES,
        CHOSEN,
        Entry(read=_read_jamba, write=_write_jamba),
        constants({"mamba_conv_bias": True, "mamba_proj_bias": False}),
    ),
    even_heads=True,
    some_attention=True,
)

HYBRIDS: Mapping[str, GgufFamily] = {
    "falcon_h1": replace(
        GATED,
        uniform=_FALCON_H1,
        widths=SEPARATE_WIDTHS | {"f": ("feed_forward.up_proj.weight", 0)},
        window="any",
        names={"head_dim": "head_dim"},
        dims=_falcon_dims,
        kinds=_falcon_kinds,
    ),
    "jamba": replace(
        GATED,
        uniform=_JAMBA,
        widths=SEPARATE_WIDTHS | {"f": ("feed_forward.up_proj.weight", 0)},
        window="any",
        dims=_jamba_dims,
        kinds=_jamba_kinds,
        stacking=stacked_apart("feed_forward.experts"),
    ),
}
"""`config.model_type` -> its description."""
