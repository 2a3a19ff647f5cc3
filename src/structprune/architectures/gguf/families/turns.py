"""Blocks of attention and others in turns, in any order: Granite 4's recurrences of Mamba 2, LFM2's short convolutions.

A file says which blocks attend by their KV heads, of which the others have none.
"""

from __future__ import annotations

import math
import re
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
from structprune.architectures.gguf.entries import HEAD_SIZE, RMS_EPSILON, ROTARY, constants, number, whole
from structprune.architectures.gguf.families.deepseek import SIGMOID, choice_bias, dense_mlp, gating
from structprune.architectures.gguf.families.gated import SCALES
from structprune.architectures.gguf.families.hybrids import STATE_SIZES, mamba2, mixer_dims
from structprune.architectures.gguf.families.llama import GATED
from structprune.architectures.gguf.families.mixtures import CHOSEN, stacked_apart
from structprune.architectures.gguf.rules import (
    SEPARATE_WIDTHS,
    attention,
    bare,
    ends,
    expert_maps,
    gated_mlp,
    head_norms,
    norm,
    router,
)
from structprune.errors import UnsupportedError

_FULL = "full_attention"


def _turns(other: str) -> Entry:
    """Build the entry of which blocks attend; the rest are of the other type."""

    def read(reading: GgufReading) -> dict[str, Any]:
        has = reading.fields.has_tensor
        return {
            "layer_types": [
                _FULL if has(f"blk.{index}.attn_q.weight") else other for index in range(reading.sizes.blocks)
            ]
        }

    def write(model: GgufModel) -> dict[str, Value]:
        types = model.layer_types()
        heads = [block.kv_heads if kind == _FULL else 0 for block, kind in zip(model.blocks, types, strict=True)]
        return {"attention.head_count_kv": heads}

    return Entry(read=read, write=write)


def _kinds(config: Any) -> list[frozenset[str]]:
    return [frozenset({kind}) for kind in config.layer_types]


def _read_granite(reading: GgufReading) -> dict[str, Any]:
    fields, hidden = reading.fields, reading.sizes.hidden
    inner, heads = fields.integer("ssm.inner_size"), fields.integer("ssm.time_step_rank")
    if inner % hidden:
        raise UnsupportedError("the recurrence is no multiple of the hidden size", where=fields.where, got=inner)
    return {
        "mamba_expand": inner // hidden,
        "mamba_n_heads": heads,
        "mamba_d_head": max(1, inner // heads),
        "mamba_n_groups": fields.integer("ssm.group_count"),
        "position_embedding_type": "rope" if fields.flag("rope.scaling.finetuned", True) else None,
    }


def _write_granite(model: GgufModel) -> dict[str, Value]:
    config = model.config
    if tuple(config.time_step_limit) != (0.0, math.inf):
        raise UnsupportedError("llama.cpp limits no steps", got=f"time_step_limit {config.time_step_limit}")
    return {
        "ssm.inner_size": int(config.mamba_n_heads * config.mamba_d_head),
        "ssm.time_step_rank": int(config.mamba_n_heads),
        "ssm.group_count": int(config.mamba_n_groups),
        "rope.scaling.finetuned": config.position_embedding_type == "rope",
    }


def _granite_dims(config: Any) -> dict[str, int]:
    return {
        **mixer_dims(
            config.mamba_n_heads * config.mamba_d_head,
            config.mamba_n_heads,
            config.mamba_n_groups,
            config.mamba_d_state,
            config.mamba_d_conv,
        ),
        "2f": 2 * config.shared_intermediate_size,
    }


_FUSED = Rule(
    source="shared_mlp.input_linear.weight", target="ffn_gate.weight", dims=("2f", "d"), sublayer="mlp", rows="front"
)
_GRANITE_HYBRID = Target(
    architecture="granitehybrid",
    outer=ends(),
    block=(
        norm(None, "input_layernorm", "attn_norm"),
        *of_kind(_FULL, bare(attention("interleave"))),
        *of_kind("linear_attention", mamba2(normed=True)),
        norm("mlp", "post_attention_layernorm", "ffn_norm"),
        _FUSED,
        replace(_FUSED, target="ffn_up.weight", rows="back"),
        Rule(source="shared_mlp.output_linear.weight", target="ffn_down.weight", dims=("d", "f"), sublayer="mlp"),
    ),
    entries=(
        RMS_EPSILON,
        HEAD_SIZE,
        ROTARY,
        *SCALES[:4],
        *STATE_SIZES,
        _turns("linear_attention"),
        Entry(read=_read_granite, write=_write_granite),
        constants({"attention_bias": False}),
    ),
    some_attention=True,
)


def _short(source: str, target: str, dims: tuple[str, ...], **more: Any) -> Rule:
    return Rule(source=f"conv.{source}.weight", target=f"shortconv.{target}.weight", dims=dims, **more)


_MAPS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _renamed(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules of an MLP by LFM2's names of its maps."""
    name = re.compile(rf"^mlp\.({'|'.join(_MAPS)})")
    return tuple(
        replace(rule, source=name.sub(lambda found: f"feed_forward.{_MAPS[found[1]]}", rule.source)) for rule in rules
    )


_LFM2 = Target(
    architecture="lfm2",
    outer=ends((norm(None, "model.embedding_norm", "token_embd_norm"),)),
    block=(
        norm(None, "operator_norm", "attn_norm"),
        *of_kind(
            _FULL,
            (*bare(attention(output="out_proj")), *head_norms("self_attn.q_layernorm", "self_attn.k_layernorm")),
        ),
        *of_kind(
            "conv",
            (
                _short("in_proj", "in_proj", ("3d", "d")),
                _short("conv", "conv", ("d", "1", "kernel"), stored_dims=("d", "kernel"), float32=True),
                _short("out_proj", "out_proj", ("d", "d")),
            ),
        ),
        norm("mlp", "ffn_norm", "ffn_norm"),
        *_renamed(bare(gated_mlp())),
    ),
    entries=(
        number("attention.layer_norm_rms_epsilon", "norm_eps"),
        HEAD_SIZE,
        ROTARY,
        whole("shortconv.l_cache", "conv_L_cache"),
        _turns("conv"),
        # The width in a file is that of the maps.
        constants({"block_auto_adjust_ff_dim": False}),
    ),
    some_attention=True,
    even_heads=True,
)
_LFM2_MOE = replace(
    _LFM2,
    architecture="lfm2moe",
    block=(
        *(rule for rule in _LFM2.block if not rule.source.startswith("feed_forward.")),
        *of_kind("dense", _renamed(dense_mlp())),
        *of_kind(
            "mixture",
            (
                router("feed_forward.gate"),
                *choice_bias("feed_forward.expert_bias"),
                *expert_maps("feed_forward.experts", "w1", "w3", "w2"),
            ),
        ),
    ),
    entries=(
        *_LFM2.entries[:-1],
        CHOSEN,
        whole("feed_forward_length", "intermediate_size", 1),
        whole("leading_dense_block_count", "num_dense_layers", 0, least=0),
        gating(SIGMOID),
    ),
    width_key="expert_feed_forward_length",
)


def _mixture_kinds(config: Any) -> list[frozenset[str]]:
    return [
        kinds | {"dense" if index < config.num_dense_layers else "mixture"}
        for index, kinds in enumerate(_kinds(config))
    ]


def _short_dims(config: Any) -> dict[str, int]:
    return {
        "1": 1,
        "3d": 3 * config.hidden_size,
        "kernel": config.conv_L_cache,
        "F": config.intermediate_size,
        "f": getattr(config, "moe_intermediate_size", config.intermediate_size),
    }


TURNS: Mapping[str, GgufFamily] = {
    "granitemoehybrid": replace(
        GATED,
        uniform=_GRANITE_HYBRID,
        widths=SEPARATE_WIDTHS | {"f": ("shared_mlp.output_linear.weight", 1)},
        window="any",
        names={"intermediate_size": "shared_intermediate_size"},
        # With experts beside the shared MLP it is another block, which is not described.
        requires={"num_local_experts": 0, "mamba_conv_bias": True, "mamba_proj_bias": False},
        dims=_granite_dims,
        kinds=_kinds,
    ),
    "lfm2": replace(
        GATED,
        uniform=_LFM2,
        activations=(),
        widths=SEPARATE_WIDTHS | {"f": ("feed_forward.w3.weight", 0)},
        window="any",
        requires={"conv_bias": False},
        dims=_short_dims,
        kinds=_kinds,
    ),
    "lfm2_moe": replace(
        GATED,
        uniform=_LFM2_MOE,
        activations=(),
        widths=SEPARATE_WIDTHS | {"f": ("feed_forward.experts.0.w3.weight", 0)},
        window="any",
        names={"intermediate_size": "moe_intermediate_size"},
        requires={"conv_bias": False, "use_expert_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        dims=_short_dims,
        kinds=_mixture_kinds,
        stacking=stacked_apart("feed_forward.experts", "w1", "w3", "w2"),
    ),
}
"""`config.model_type` -> its description."""
