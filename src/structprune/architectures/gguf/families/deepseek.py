"""Mixtures with a few dense blocks in front and experts that all tokens pass: DeepSeek, GLM 4.5, dots.llm1."""

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
    of_kind,
)
from structprune.architectures.gguf.entries import (
    HEAD_SIZE,
    RMS_EPSILON,
    constants,
    derived,
    flag,
    number,
    rotary,
    whole,
)
from structprune.architectures.gguf.families.latent import LATENT, LATENT_BLOCK, latent_dims
from structprune.architectures.gguf.families.llama import GATED, USUAL
from structprune.architectures.gguf.families.mixtures import CHOSEN, shared_expert, stacked_apart
from structprune.architectures.gguf.rules import (
    INPUT_BIASES,
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

SOFTMAX, SIGMOID = 1, 2
"""llama.cpp's numbers for how scores of experts are made."""


def gating(function: int) -> Entry:
    """Build the entry of a type that makes scores in one way."""
    return Entry(
        read=lambda reading: reading.fields.skip("expert_gating_func") or {},
        write=lambda _: {"expert_gating_func": function},
    )


def is_gated(function: int, *, unless_said: bool) -> Any:
    """Return whether a file makes scores of experts in this way, or says nothing of it."""

    def check(reading: GgufReading) -> bool:
        said = reading.fields.raw("expert_gating_func") or 0
        return said == function or (not said and unless_said)

    return check


def dense_mlp() -> tuple[Rule, ...]:
    """Return the rules of a dense MLP of the width `F`."""
    return tuple(
        replace(rule, dims=tuple("F" if dim == "f" else dim for dim in rule.dims)) for rule in bare(gated_mlp())
    )


def choice_bias(
    source: str = "mlp.gate.e_score_correction_bias", target: str = "exp_probs_b.bias", **more: Any
) -> tuple[Rule]:
    """Return the rule of a bias that a router adds to its scores for the choice alone."""
    return (Rule(**{"source": source, "target": target, "dims": ("e",), "sublayer": "mlp", **more}),)


def dense_or_mixture(
    bias: tuple[Rule, ...], *, gate: str = "mlp.gate", shared: str = "mlp.shared_experts"
) -> tuple[Rule, ...]:
    """Return the rules of a dense MLP of the width `F`, or of a mixture with this bias for the choice."""
    mixture = (router(gate), *bias, *expert_maps("mlp.experts"), *shared_expert(shared))
    return (*of_kind("dense", dense_mlp()), *of_kind("mixture", mixture))


def leading_dense(config: Any) -> list[frozenset[str]]:
    """Return the kinds of blocks of a config that counts its dense ones."""
    first = config.first_k_dense_replace
    return [frozenset({"dense" if index < first else "mixture"}) for index in range(config.num_hidden_layers)]


def by_mlp_types(config: Any) -> list[frozenset[str]]:
    """Return the kinds of blocks of a config that lists them."""
    return [frozenset({"mixture" if kind == "sparse" else "dense"}) for kind in config.mlp_layer_types]


def dense_blocks(reading: GgufReading) -> int:
    """Count the blocks of a file that are no mixtures."""
    has = reading.fields.has_tensor
    return sum(not has(f"blk.{index}.ffn_gate_inp.weight") for index in range(reading.sizes.blocks))


def mlp_types() -> Entry:
    """Build the entry of a config that lists which blocks are mixtures: all behind the dense ones in front."""

    def read(reading: GgufReading) -> dict[str, Any]:
        dense = dense_blocks(reading)
        return {"mlp_layer_types": ["dense"] * dense + ["sparse"] * (reading.sizes.blocks - dense)}

    def count(model: GgufModel) -> int:
        types = [model.config.mlp_layer_types[block.index] for block in model.blocks]
        dense = types.count("dense")
        if "dense" in types[dense:]:
            raise UnsupportedError(
                f"llama.cpp's {model.target.architecture} has its dense blocks in front", got=f"mlp_layer_types {types}"
            )
        return dense

    key = derived("leading_dense_block_count", dense_blocks, count)
    return Entry(read=lambda reading: {**key.read(reading), **read(reading)}, write=key.write)


def mixture_dims(config: Any) -> dict[str, int]:
    """Return the widths of dense MLPs, of all shared experts together, and of one expert."""
    return {
        "F": config.intermediate_size,
        "s": config.moe_intermediate_size * config.n_shared_experts,
        "f": config.moe_intermediate_size,
    }


MIXTURE_ENTRIES: tuple[Entry, ...] = (
    CHOSEN,
    whole("feed_forward_length", "intermediate_size", 1),
    whole("leading_dense_block_count", "first_k_dense_replace", 0, least=0),
    whole("expert_shared_count", "n_shared_experts"),
    number("expert_weights_scale", "routed_scaling_factor", 1.0, zero_is_none=True),
    flag("expert_weights_norm", "norm_topk_prob", False),
)
_GROUPS = (
    whole("expert_group_count", "n_group", 1),
    whole("expert_group_used_count", "topk_group", 1),
)
MIXTURE_NAMES = {"intermediate_size": "moe_intermediate_size", "num_experts": "n_routed_experts"}


def latent_kinds(config: Any) -> frozenset[str]:
    """Return whether queries come from latents too."""
    return frozenset({"low rank" if config.q_lora_rank else "full rank"})


def _deepseek_kinds(config: Any) -> list[frozenset[str]]:
    return [kinds | latent_kinds(config) for kinds in leading_dense(config)]


_DEEPSEEK3 = Target(
    architecture="deepseek2",
    outer=ends(),
    block=(*LATENT_BLOCK, *dense_or_mixture(choice_bias())),
    entries=(RMS_EPSILON, LATENT, *MIXTURE_ENTRIES, *_GROUPS, gating(SIGMOID), constants({"rope_interleave": True})),
    width_key="expert_feed_forward_length",
    latent=True,
)
_DEEPSEEK2 = replace(
    _DEEPSEEK3,
    block=(*LATENT_BLOCK, *dense_or_mixture(())),
    entries=(RMS_EPSILON, LATENT, *MIXTURE_ENTRIES, gating(SOFTMAX), constants({"mlp_bias": False})),
)
_DEEPSEEK_FAMILY = replace(
    GATED,
    uniform=_DEEPSEEK3,
    widths={"f": ("mlp.experts.0.up_proj.weight", 0)},
    window="any",
    names={**MIXTURE_NAMES, "head_dim": "", "num_key_value_heads": ""},
    kv_heads=lambda _: 1,
    dims=lambda config: {**latent_dims(config), **mixture_dims(config)},
    kinds=_deepseek_kinds,
    stacking=stacked_apart("mlp.experts"),
    read_if=is_gated(SIGMOID, unless_said=False),
)

_GLM4_MOE = Target(
    architecture="glm4moe",
    outer=ends(),
    block=(
        norm("attention", "input_layernorm", "attn_norm"),
        *(rule for rule in attention() if not rule.source.endswith("o_proj.bias")),
        *of_kind("normed heads", head_norms()),
        norm("mlp", "post_attention_layernorm", "post_attention_norm"),
        *dense_or_mixture(choice_bias()),
    ),
    entries=(
        RMS_EPSILON,
        HEAD_SIZE,
        rotary(partial=True),
        *MIXTURE_ENTRIES,
        gating(SIGMOID),
        Entry(read=lambda reading: _glm_norms(reading), write=lambda _: {}),
    ),
    width_key="expert_feed_forward_length",
)

_DOTS1 = Target(
    architecture="dots1",
    outer=ends(),
    block=(
        norm("attention", "input_layernorm", "attn_norm"),
        *bare(attention()),
        *head_norms(),
        norm("mlp", "post_attention_layernorm", "ffn_norm"),
        *dense_or_mixture(choice_bias()),
    ),
    entries=(*USUAL, *MIXTURE_ENTRIES, gating(SIGMOID), constants({"attention_bias": False, "sliding_window": None})),
    width_key="expert_feed_forward_length",
    needs_head=True,
    no_groups=True,
)


def _glm_kinds(config: Any) -> list[frozenset[str]]:
    normed = {"normed heads"} if config.use_qk_norm else set[str]()
    return [kinds | normed for kinds in leading_dense(config)]


def _glm_norms(reading: GgufReading) -> dict[str, Any]:
    return {"use_qk_norm": reading.fields.has_tensor("blk.0.attn_q_norm.weight")}


APART = replace(
    GATED,
    widths=SEPARATE_WIDTHS | {"f": ("mlp.experts.0.up_proj.weight", 0)},
    window="any",
    names=MIXTURE_NAMES,
    dims=mixture_dims,
    kinds=leading_dense,
    stacking=stacked_apart("mlp.experts"),
    requires={"n_group": 1, "topk_group": 1},
)

_LISTED = (CHOSEN, MIXTURE_ENTRIES[1], mlp_types(), *MIXTURE_ENTRIES[3:])
DEEPSEEK: Mapping[str, GgufFamily] = {
    "deepseek_v3": _DEEPSEEK_FAMILY,
    "deepseek_v2": replace(
        _DEEPSEEK_FAMILY,
        uniform=_DEEPSEEK2,
        requires={"n_group": None, "topk_group": None, "topk_method": "greedy"},
        read_if=is_gated(SOFTMAX, unless_said=True),
    ),
    # The same block, whose config says otherwise which are mixtures: a file of it is read as DeepSeek's.
    "glm4_moe_lite": replace(
        _DEEPSEEK_FAMILY,
        uniform=replace(
            _DEEPSEEK3,
            entries=(
                RMS_EPSILON,
                LATENT,
                *_LISTED,
                *_GROUPS,
                gating(SIGMOID),
                constants({"rope_interleave": True}),
            ),
        ),
        kinds=lambda config: [
            kinds | {"low rank" if config.q_lora_rank else "full rank"} for kinds in by_mlp_types(config)
        ],
        read_if=lambda _: False,
    ),
    "dots1": replace(APART, uniform=_DOTS1, names={**MIXTURE_NAMES, "head_dim": "head_dim"}, window="caps-context"),
    "glm4_moe": replace(
        APART,
        uniform=_GLM4_MOE,
        names={**MIXTURE_NAMES, "head_dim": "head_dim"},
        biases={"attention_bias": INPUT_BIASES},
        kinds=_glm_kinds,
    ),
}
"""`config.model_type` -> its description."""
