"""Mixtures whose experts all tokens pass beside the chosen ones, or that choose by scores with a bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from structprune.architectures.gguf.description import Entry, GgufFamily, GgufReading, Rule, Target
from structprune.architectures.gguf.entries import (
    HEAD_SIZE,
    RMS_EPSILON,
    constants,
    derived,
    local_rotary,
    number,
    only,
    rotary,
    whole,
    windows,
)
from structprune.architectures.gguf.families.deepseek import (
    APART,
    MIXTURE_ENTRIES,
    MIXTURE_NAMES,
    SIGMOID,
    by_mlp_types,
    choice_bias,
    dense_blocks,
    dense_or_mixture,
    gating,
    mlp_types,
)
from structprune.architectures.gguf.families.llama import USUAL
from structprune.architectures.gguf.families.mixtures import CHOSEN, shared_expert, stacked_apart
from structprune.architectures.gguf.rules import (
    SEPARATE_WIDTHS,
    attention,
    bare,
    ends,
    expert_maps,
    head_norms,
    norm,
    router,
)

_EXPERT_WIDTH = "expert_feed_forward_length"
_MLP_WIDTH = whole("feed_forward_length", "intermediate_size", 1)
_PRE_NORMS = (
    norm("attention", "input_layernorm", "attn_norm"),
    norm("mlp", "post_attention_layernorm", "ffn_norm"),
)


def _shared_width(count: str) -> Entry:
    """Build the entry of the width of all shared experts together, which is so many times that of one expert."""
    return derived(
        "expert_shared_feed_forward_length",
        lambda reading: reading.sizes.channels * reading.fields.integer("expert_shared_count", 1),
        lambda model: model.blocks[0].channels * getattr(model.config, count),
    )


def _wide(count: str) -> Callable[[Any], dict[str, int]]:
    """Return the widths of dense MLPs and of all shared experts together, by the config's name for their number."""
    return lambda config: {
        "1": 1,
        "F": config.intermediate_size,
        "s": config.moe_intermediate_size * getattr(config, count),
        "f": config.moe_intermediate_size,
    }


def _first_dense(count: str) -> Callable[[Any], list[frozenset[str]]]:
    """Return the kinds of blocks, by the config's name for the number of dense ones in front."""
    return lambda config: [
        frozenset({"dense" if index < getattr(config, count) else "mixture"})
        for index in range(config.num_hidden_layers)
    ]


_ERNIE_MOE = Target(
    architecture="ernie4_5-moe",
    outer=ends(),
    block=(
        *_PRE_NORMS,
        *bare(attention()),
        *dense_or_mixture(
            choice_bias(
                "mlp.gate.moe_statics.e_score_correction_bias", dims=("1", "e"), stored_dims=("e",), float32=True
            )
        ),
    ),
    entries=(
        *USUAL,
        CHOSEN,
        _MLP_WIDTH,
        whole("leading_dense_block_count", "moe_layer_start_index", 0, least=0),
        whole("expert_shared_count", "moe_num_shared_experts"),
        _shared_width("moe_num_shared_experts"),
        derived("interleave_moe_layer_step", lambda _: 1, lambda _: 1),
        Entry(read=lambda reading: {"moe_layer_end_index": reading.sizes.blocks - 1}, write=lambda _: {}),
    ),
    width_key=_EXPERT_WIDTH,
)
_HUNYUAN_MOE = Target(
    architecture="hunyuan-moe",
    outer=ends(),
    block=(
        *_PRE_NORMS,
        *bare(attention()),
        *head_norms("self_attn.query_layernorm", "self_attn.key_layernorm"),
        router("mlp.gate.wg"),
        *expert_maps("mlp.experts"),
        *shared_expert("mlp.shared_mlp"),
    ),
    entries=(
        *USUAL,
        whole("expert_used_count", "moe_topk"),
        *(
            derived(key, lambda reading: reading.sizes.channels, lambda model: model.blocks[0].channels)
            for key in (_EXPERT_WIDTH, "expert_shared_feed_forward_length")
        ),
        only("expert_shared_count", 1),
        constants({"attention_bias": False}),
    ),
)
_MINIMAX_M2 = Target(
    architecture="minimax-m2",
    outer=ends(),
    block=(
        *_PRE_NORMS,
        *bare(attention()),
        norm("attention", "self_attn.q_norm", "attn_q_norm", "q"),
        norm("attention", "self_attn.k_norm", "attn_k_norm", "k"),
        router("mlp.gate"),
        *choice_bias("mlp.e_score_correction_bias"),
        *expert_maps("mlp.experts", "w1", "w3", "w2"),
    ),
    entries=(
        RMS_EPSILON,
        HEAD_SIZE,
        rotary(partial=True),
        CHOSEN,
        derived(_EXPERT_WIDTH, lambda reading: reading.sizes.channels, lambda model: model.blocks[0].channels),
        gating(SIGMOID),
    ),
    needs_head=True,
)


def _is_scored(reading: GgufReading) -> bool:
    return reading.fields.raw("expert_gating_func") == SIGMOID


_AFMOE = Target(
    architecture="afmoe",
    outer=ends(),
    block=(
        norm("attention", "input_layernorm", "attn_norm"),
        *bare(attention()),
        *head_norms(),
        Rule(source="self_attn.gate_proj.weight", target="attn_gate.weight", dims=("q", "d"), sublayer="attention"),
        norm("attention", "post_attention_layernorm", "post_attention_norm"),
        norm("mlp", "pre_mlp_layernorm", "ffn_norm"),
        *dense_or_mixture(choice_bias("mlp.expert_bias"), gate="mlp.router.gate"),
        norm("mlp", "post_mlp_layernorm", "post_ffw_norm"),
    ),
    entries=(
        *USUAL,
        CHOSEN,
        _MLP_WIDTH,
        whole("leading_dense_block_count", "num_dense_layers", 0, least=0),
        whole("expert_shared_count", "num_shared_experts"),
        number("expert_weights_scale", "route_scale", 1.0, zero_is_none=True),
        derived("expert_weights_norm", lambda _: True, lambda _: True),
        gating(SIGMOID),
        windows(4),
        constants({"attention_bias": False}),
    ),
    width_key=_EXPERT_WIDTH,
)
_EXAONE_MOE = Target(
    architecture="exaone-moe",
    outer=ends(),
    block=(*_PRE_NORMS, *bare(attention()), *head_norms(), *dense_or_mixture(choice_bias())),
    entries=(
        *USUAL,
        CHOSEN,
        _MLP_WIDTH,
        mlp_types(),
        Entry(read=lambda reading: {"first_k_dense_replace": dense_blocks(reading)}, write=lambda _: {}),
        whole("expert_shared_count", "num_shared_experts"),
        *MIXTURE_ENTRIES[4:],
        _shared_width("num_shared_experts"),
        gating(SIGMOID),
        windows(4),
        only("nextn_predict_layers", 0),
    ),
    width_key=_EXPERT_WIDTH,
)
_HY_V3 = Target(
    architecture="hy_v3",
    outer=ends(),
    block=(
        *_PRE_NORMS,
        *bare(attention()),
        *head_norms(),
        *dense_or_mixture(choice_bias("mlp.e_score_correction_bias", "exp_probs_b")),
    ),
    entries=(
        *USUAL,
        CHOSEN,
        _MLP_WIDTH,
        mlp_types(),
        whole("expert_shared_count", "num_shared_experts", 1),
        _shared_width("num_shared_experts"),
        number("expert_weights_scale", "router_scaling_factor", 1.0, zero_is_none=True),
        derived("expert_weights_norm", lambda _: True, lambda _: True),
        gating(SIGMOID),
        only("nextn_predict_layers", 0),
        constants({"attention_bias": False, "mlp_bias": False}),
    ),
    width_key=_EXPERT_WIDTH,
)
_MELLUM = Target(
    architecture="mellum",
    outer=ends(),
    block=(*_PRE_NORMS, *bare(attention()), *head_norms(), router("mlp.gate"), *expert_maps("mlp.experts")),
    entries=(
        RMS_EPSILON,
        HEAD_SIZE,
        local_rotary(),
        CHOSEN,
        _MLP_WIDTH,
        windows(4, may_lack=True),
        constants({"attention_bias": False}),
    ),
    width_key=_EXPERT_WIDTH,
    needs_head=True,
)

_ROUTED = replace(APART, requires={}, names={"intermediate_size": "moe_intermediate_size", "head_dim": "head_dim"})
ROUTED: Mapping[str, GgufFamily] = {
    "ernie4_5_moe": replace(
        _ROUTED,
        uniform=_ERNIE_MOE,
        names={"intermediate_size": "moe_intermediate_size", "num_experts": "moe_num_experts"},
        requires={"use_bias": False, "moe_layer_interval": 1},
        dims=_wide("moe_num_shared_experts"),
        kinds=_first_dense("moe_layer_start_index"),
    ),
    "hunyuan_v1_moe": replace(
        _ROUTED,
        uniform=_HUNYUAN_MOE,
        names={"head_dim": "head_dim"},
        dims=lambda config: {"s": config.intermediate_size},
        kinds=None,
    ),
    "minimax_m2": replace(
        _ROUTED,
        uniform=_MINIMAX_M2,
        widths=SEPARATE_WIDTHS | {"f": ("mlp.experts.0.w3.weight", 0)},
        names={"num_experts": "num_local_experts", "head_dim": "head_dim"},
        stacking=stacked_apart("mlp.experts", "w1", "w3", "w2"),
        dims=lambda _: {},
        kinds=None,
        read_if=_is_scored,
    ),
    "afmoe": replace(
        _ROUTED,
        uniform=_AFMOE,
        requires={"mup_enabled": True},
        dims=_wide("num_shared_experts"),
        kinds=_first_dense("num_dense_layers"),
    ),
    "exaone_moe": replace(
        _ROUTED,
        uniform=_EXAONE_MOE,
        names={**MIXTURE_NAMES, "num_experts": "num_experts", "head_dim": "head_dim"},
        requires={"n_group": 1, "topk_group": 1},
        dims=_wide("num_shared_experts"),
        kinds=by_mlp_types,
    ),
    "hy_v3": replace(_ROUTED, uniform=_HY_V3, dims=_wide("num_shared_experts"), kinds=by_mlp_types),
    "mellum": replace(_ROUTED, uniform=_MELLUM, requires={"norm_topk_prob": True}, dims=lambda _: {}, kinds=None),
}
"""`config.model_type` -> its description."""
