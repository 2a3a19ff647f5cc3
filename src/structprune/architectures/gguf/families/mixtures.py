"""Mixtures of experts. Experts are stacked in the file, whatever a checkpoint does with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from structprune.architectures.gguf.description import Entry, GgufFamily, GgufModel, GgufReading, Rule, Target, of_kind
from structprune.architectures.gguf.entries import constants, only, unturned, whole, windows
from structprune.architectures.gguf.families.gated import SCALES
from structprune.architectures.gguf.families.llama import GATED, USUAL
from structprune.architectures.gguf.rules import (
    INPUT_BIASES,
    LLAMA3_FACTORS,
    SEPARATE_WIDTHS,
    attention,
    bare,
    biased,
    ends,
    expert_maps,
    gated_mlp,
    linear,
    norm,
    router,
)
from structprune.checkpoint.stacked import Stacking

CHOSEN = whole("expert_used_count", "num_experts_per_tok")
_EXPERT_WIDTH = "expert_feed_forward_length"
_MLP_WIDTH = whole("feed_forward_length", "intermediate_size", 1)
_NO_BIAS = constants({"attention_bias": False})


def stacked_apart(module: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Stacking:
    """Return how experts are stacked by transformers whose checkpoints usually have each map by itself."""
    return Stacking(
        module=module,
        maps={"gate_up_proj": (f"{gate}.weight", f"{up}.weight"), "down_proj": (f"{down}.weight",)},
    )


def _together(module: str, *, transposed: bool = False, biased: bool = False) -> Stacking:
    """Return how experts are stacked in checkpoints that have no other form, gate and up in one map."""
    maps = {"gate_up_proj": ("gate_up_proj.weight",), "down_proj": ("down_proj.weight",)}
    if biased:
        maps |= {"gate_up_proj_bias": ("gate_up_proj.bias",), "down_proj_bias": ("down_proj_bias",)}
    return Stacking(module=module, maps=maps, transposed=transposed)


def _fused_maps(module: str, first: str, second: str) -> tuple[Rule, ...]:
    """Return the rules of experts with gate and up in one map, whose rows `first` and `second` say."""
    gate = Rule(
        source=f"{module}.{{}}.gate_up_proj.weight",
        target="ffn_gate_exps.weight",
        dims=("2f", "d"),
        sublayer="mlp",
        stacked="e",
        rows=first,  # pyright: ignore[reportArgumentType]
    )
    down = replace(
        gate,
        source=f"{module}.{{}}.down_proj.weight",
        target="ffn_down_exps.weight",
        dims=("d", "f"),
        rows="all",
    )
    return gate, replace(gate, target="ffn_up_exps.weight", rows=second), down  # pyright: ignore[reportArgumentType]


def _attention_block(*rules: Rule, rope: Any = "copy") -> tuple[Rule, ...]:
    """Return a block with norms in front, attention without biases, and these rules of its mixture."""
    return (
        norm("attention", "input_layernorm", "attn_norm"),
        *bare(attention(rope)),
        norm("mlp", "post_attention_layernorm", "ffn_norm"),
        *rules,
    )


_MIXTRAL = Target(
    architecture="llama",
    outer=ends(),
    block=_attention_block(router("mlp.gate"), *expert_maps("mlp.experts", "w1", "w3", "w2"), rope="interleave"),
    entries=(*USUAL, CHOSEN, constants({"sliding_window": None})),
    rope_factors=LLAMA3_FACTORS,
)
_OLMOE = Target(
    architecture="olmoe",
    outer=ends(),
    block=_attention_block(
        norm("attention", "self_attn.q_norm", "attn_q_norm", "q"),
        norm("attention", "self_attn.k_norm", "attn_k_norm", "k"),
        router("mlp.gate"),
        *expert_maps("mlp.experts"),
    ),
    entries=(*USUAL, CHOSEN, _NO_BIAS),
    even_heads=True,
    needs_head=True,
    no_groups=True,
)


def _shared(source: str, name: str, dims: tuple[str, ...], **more: Any) -> Rule:
    return Rule(source=f"{source}.weight", target=f"ffn_{name}.weight", dims=dims, sublayer="mlp", **more)


def shared_expert(module: str) -> tuple[Rule, ...]:
    """Return the rules of an expert that all tokens pass, of the width `s`."""
    return (
        _shared(f"{module}.gate_proj", "gate_shexp", ("s", "d")),
        _shared(f"{module}.up_proj", "up_shexp", ("s", "d")),
        _shared(f"{module}.down_proj", "down_shexp", ("d", "s")),
    )


def shared_gate(source: str) -> Rule:
    """Return the rule of what weighs such an expert: one row, which is a vector in the file."""
    return _shared(source, "gate_inp_shexp", ("1", "d"), stored_dims=("d",))


_QWEN2_MOE = Target(
    architecture="qwen2moe",
    outer=ends(),
    block=(
        norm("attention", "input_layernorm", "attn_norm"),
        *(rule for rule in attention() if not rule.source.endswith("o_proj.bias")),
        norm("mlp", "post_attention_layernorm", "ffn_norm"),
        router("mlp.gate"),
        *expert_maps("mlp.experts"),
        *shared_expert("mlp.shared_expert"),
        shared_gate("mlp.shared_expert_gate"),
    ),
    entries=(
        *USUAL,
        _MLP_WIDTH,
        CHOSEN,
        whole("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        constants({"use_sliding_window": False, "sliding_window": None}),
    ),
    width_key=_EXPERT_WIDTH,
    even_heads=True,
    needs_head=True,
)

_GRANITE_MOE = Target(
    architecture="granitemoe",
    outer=ends(),
    block=_attention_block(
        router("block_sparse_moe.router"),
        *_fused_maps("block_sparse_moe.experts", "front", "back"),
        rope="interleave",
    ),
    entries=(*USUAL, *SCALES, CHOSEN, _NO_BIAS),
    rope_factors=LLAMA3_FACTORS,
)
_GRANITE_SHARED = replace(
    _GRANITE_MOE,
    block=(
        *_GRANITE_MOE.block,
        _shared("shared_mlp.input_linear", "gate_shexp", ("2s", "d"), rows="front"),
        _shared("shared_mlp.input_linear", "up_shexp", ("2s", "d"), rows="back"),
        _shared("shared_mlp.output_linear", "down_shexp", ("d", "s")),
    ),
    entries=(
        *_GRANITE_MOE.entries,
        whole("expert_shared_feed_forward_length", "shared_intermediate_size"),
    ),
)
_GRANITE_FAMILY = replace(
    GATED,
    uniform=_GRANITE_MOE,
    widths=SEPARATE_WIDTHS | {"f": ("block_sparse_moe.experts.0.down_proj.weight", 1)},
    window="any",
    names={"head_dim": "head_dim", "num_experts": "num_local_experts"},
    stacking=_together("block_sparse_moe.experts"),
    written_stacked=True,
)

_GPT_OSS_MAPS = _fused_maps("mlp.experts", "even", "odd")
_GPT_OSS = Target(
    architecture="gpt-oss",
    outer=ends(),
    block=biased(
        (
            norm("attention", "input_layernorm", "attn_norm"),
            *attention(),
            Rule(source="self_attn.sinks", target="attn_sinks.weight", dims=("n",), sublayer="attention"),
            norm("mlp", "post_attention_layernorm", "post_attention_norm"),
            *linear("mlp", "mlp.router", "ffn_gate_inp", "e", "d"),
            *_GPT_OSS_MAPS,
            *(
                replace(
                    rule,
                    source=bias.format("{}"),
                    target=rule.target.replace("weight", "bias"),
                    dims=rule.dims[:1],
                    float32=True,
                )
                for rule, bias in zip(
                    _GPT_OSS_MAPS,
                    (*["mlp.experts.{}.gate_up_proj.bias"] * 2, "mlp.experts.{}.down_proj_bias"),
                    strict=True,
                )
            ),
        )
    ),
    entries=(
        *USUAL,
        CHOSEN,
        windows(2),
        # Experts are all of its MLPs, and as wide as the file says of both.
        Entry(read=lambda _: {}, write=lambda model: {"feed_forward_length": int(model.config.intermediate_size)}),
    ),
    width_key=_EXPERT_WIDTH,
    unused=("feed_forward_length",),
    needs_head=True,
)


def _llama4_kinds(config: Any) -> list[frozenset[str]]:
    return [
        frozenset({"mixture" if index in config.moe_layers else "dense"}) for index in range(config.num_hidden_layers)
    ]


def _read_llama4(reading: GgufReading) -> dict[str, Any]:
    step = reading.fields.integer("interleave_moe_layer_step")
    # llama.cpp knows the largest by its experts, and norms no queries there.
    return {
        "interleave_moe_layer_step": step,
        "moe_layers": list(range(step - 1, reading.sizes.blocks, step)),
        "use_qk_norm": reading.sizes.experts != 128,
    }


def _write_llama4(model: GgufModel) -> dict[str, int]:
    return {"interleave_moe_layer_step": int(model.config.interleave_moe_layer_step)}


_LLAMA4 = Target(
    architecture="llama4",
    outer=ends(),
    block=(
        *_attention_block(),
        *of_kind(
            "dense",
            tuple(
                replace(
                    rule,
                    source=rule.source.replace("mlp.", "feed_forward."),
                    dims=tuple("F" if dim == "f" else dim for dim in rule.dims),
                )
                for rule in bare(gated_mlp())
            ),
        ),
        *of_kind(
            "mixture",
            (
                router("feed_forward.router"),
                *_fused_maps("feed_forward.experts", "front", "back"),
                *shared_expert("feed_forward.shared_expert"),
            ),
        ),
    ),
    entries=(
        *USUAL,
        CHOSEN,
        whole("feed_forward_length", "intermediate_size_mlp"),
        Entry(read=_read_llama4, write=_write_llama4),
        unturned(4),
        _NO_BIAS,
        only("attention.sliding_window", 8192),
    ),
    width_key=_EXPERT_WIDTH,
    rope_factors=LLAMA3_FACTORS,
)

_APART_WIDTHS = SEPARATE_WIDTHS | {"f": ("mlp.experts.0.up_proj.weight", 0)}
MIXTURES: Mapping[str, GgufFamily] = {
    "mixtral": replace(
        GATED,
        uniform=_MIXTRAL,
        widths=SEPARATE_WIDTHS | {"f": ("mlp.experts.0.w3.weight", 0)},
        stacking=stacked_apart("mlp.experts", "w1", "w3", "w2"),
        read_if=lambda reading: reading.sizes.experts > 0,
    ),
    "olmoe": replace(
        GATED,
        uniform=_OLMOE,
        widths=_APART_WIDTHS,
        window="any",
        stacking=stacked_apart("mlp.experts"),
        requires={"norm_topk_prob": False, "clip_qkv": None},
    ),
    "qwen2_moe": replace(
        GATED,
        uniform=_QWEN2_MOE,
        widths=_APART_WIDTHS,
        biases={"qkv_bias": INPUT_BIASES},
        names={"intermediate_size": "moe_intermediate_size"},
        stacking=stacked_apart("mlp.experts"),
        dims=lambda config: {"s": config.shared_expert_intermediate_size, "1": 1},
        requires={"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    "granitemoeshared": replace(
        _GRANITE_FAMILY,
        uniform=_GRANITE_SHARED,
        dims=lambda config: {"s": config.shared_intermediate_size, "2s": 2 * config.shared_intermediate_size},
        read_if=lambda reading: bool(reading.fields.raw("expert_shared_feed_forward_length")),
    ),
    "granitemoe": _GRANITE_FAMILY,
    "gpt_oss": replace(
        GATED,
        uniform=_GPT_OSS,
        widths=SEPARATE_WIDTHS | {"f": ("mlp.experts.0.down_proj.weight", 1)},
        window="any",
        requires={"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True},
        stacking=_together("mlp.experts", transposed=True, biased=True),
        written_stacked=True,
    ),
    "llama4_text": replace(
        GATED,
        uniform=_LLAMA4,
        widths=SEPARATE_WIDTHS | {"f": ("feed_forward.experts.0.down_proj.weight", 1)},
        window="any",
        names={"num_experts": "num_local_experts"},
        requires={
            "attention_chunk_size": 8192,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "attn_scale": 0.1,
        },
        dims=lambda config: {
            "F": config.intermediate_size_mlp,
            "s": config.intermediate_size,
            "f": config.intermediate_size,
        },
        kinds=_llama4_kinds,
        stacking=_together("feed_forward.experts", transposed=True),
        written_stacked=True,
    ),
}
"""`config.model_type` -> its description."""
