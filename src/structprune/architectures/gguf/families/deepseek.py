"""Mixtures with a few dense blocks in front and experts that all tokens pass; DeepSeek's attention from latents.

In the file keys and values of a head are two tensors, the keys' transposed, so that llama.cpp multiplies queries by
them first; a file of an older converter, which has one tensor for both, is refused by that tensor's name.
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
from structprune.architectures.gguf.entries import HEAD_SIZE, RMS_EPSILON, constants, flag, number, rotary, whole
from structprune.architectures.gguf.families.llama import GATED, USUAL
from structprune.architectures.gguf.families.mixtures import CHOSEN, shared_expert, stacked_apart
from structprune.architectures.gguf.rope_reading import read_rope
from structprune.architectures.gguf.rope_writing import rope_parameters, write_rope
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


def dense_or_mixture(*, scored: bool, shared: str = "mlp.shared_experts") -> tuple[Rule, ...]:
    """Return the rules of a dense MLP of the width `F`, or of a mixture; `scored`: with a bias for the choice."""
    bias = Rule(source="mlp.gate.e_score_correction_bias", target="exp_probs_b.bias", dims=("e",), sublayer="mlp")
    mixture = (
        router("mlp.gate"),
        *((bias,) if scored else ()),
        *expert_maps("mlp.experts"),
        *shared_expert(shared),
    )
    return (*of_kind("dense", dense_mlp()), *of_kind("mixture", mixture))


def leading_dense(config: Any) -> list[frozenset[str]]:
    """Return the kinds of blocks of a config that counts its dense ones."""
    first = config.first_k_dense_replace
    return [frozenset({"dense" if index < first else "mixture"}) for index in range(config.num_hidden_layers)]


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


# llama.cpp knows the models whose queries come straight from the stream by their blocks.
_WITHOUT_QUERY_LATENTS = (26, 27)


def _read_latent(reading: GgufReading) -> dict[str, Any]:
    fields = reading.fields
    rotated = fields.integer("rope.dimension_count")
    whole_key = fields.integer("attention.key_length_mla")
    parameters = read_rope(fields, rotated, reading.sizes.positions, partial=False, log_multiplier=False, factors=())
    # The converter writes a tenth of it, which llama.cpp takes back.
    multiplier = fields.number("rope.scaling.yarn_log_multiplier", 0.0) * 10
    if multiplier:
        parameters |= {"mscale": float(f"{multiplier:.6g}"), "mscale_all_dim": float(f"{multiplier:.6g}")}
    rank = fields.integer("attention.q_lora_rank", 0, least=0)
    return {
        "q_lora_rank": rank or None,
        "kv_lora_rank": fields.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": whole_key - rotated,
        "v_head_dim": fields.integer("attention.value_length_mla"),
        "num_key_value_heads": reading.sizes.heads,
        "rope_parameters": parameters,
        "attention_bias": False,
    }


def _write_latent(model: GgufModel) -> dict[str, Value]:
    config = model.config
    parameters = rope_parameters(model)
    both = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if both[1] and both[0] != both[1]:
        raise UnsupportedError(
            "llama.cpp's deepseek2 knows one scale of YaRN", got=f"mscale {both[0]}, mscale_all_dim {both[1]}"
        )
    if not config.q_lora_rank and len(model.blocks) not in _WITHOUT_QUERY_LATENTS:
        raise UnsupportedError(
            "llama.cpp's deepseek2 has queries without latents with 26 or 27 blocks, and with no other number",
            got=f"q_lora_rank {config.q_lora_rank}, {len(model.blocks)} blocks",
        )
    keys = write_rope(model, partial=False, log_multiplier=bool(both[1]), scale_is_one=False)
    keys.pop("rope.scaling.yarn_log_multiplier", None)
    keys |= {"rope.scaling.yarn_log_multiplier": 0.1 * both[1]} if both[1] else {}
    rank = {"attention.q_lora_rank": int(config.q_lora_rank)} if config.q_lora_rank else {}
    return {
        **keys,
        **rank,
        "attention.kv_lora_rank": int(config.kv_lora_rank),
        "attention.key_length": int(config.kv_lora_rank + config.qk_rope_head_dim),
        "attention.value_length": int(config.kv_lora_rank),
        "attention.key_length_mla": int(config.qk_nope_head_dim + config.qk_rope_head_dim),
        "attention.value_length_mla": int(config.v_head_dim),
    }


LATENT = Entry(read=_read_latent, write=_write_latent)
"""DeepSeek's attention: the sizes of latents, keys and values, and rotary positions."""


def latent_dims(config: Any) -> dict[str, int]:
    """Return the dimensions of attention from latents."""
    heads, key = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    return {
        "lq": config.q_lora_rank or 0,
        "lk": config.kv_lora_rank,
        "lk+r": config.kv_lora_rank + config.qk_rope_head_dim,
        "nk": heads * key,
        "kv": heads * (config.qk_nope_head_dim + config.v_head_dim),
        "nv": heads * config.v_head_dim,
        "n": heads,
        "nope": config.qk_nope_head_dim,
        "hv": config.v_head_dim,
    }


def _latent_rules() -> tuple[Rule, ...]:
    def plain(source: str, target: str, dims: tuple[str, ...], **more: Any) -> Rule:
        return Rule(
            source=f"self_attn.{source}.weight", target=f"{target}.weight", dims=dims, sublayer="attention", **more
        )

    low = (
        plain("q_a_proj", "attn_q_a", ("lq", "d")),
        plain("q_a_layernorm", "attn_q_a_norm", ("lq",)),
        plain("q_b_proj", "attn_q_b", ("nk", "lq")),
    )
    return (
        norm("attention", "input_layernorm", "attn_norm"),
        *of_kind("low rank", low),
        *of_kind("full rank", (plain("q_proj", "attn_q", ("nk", "d")),)),
        plain("kv_a_proj_with_mqa", "attn_kv_a_mqa", ("lk+r", "d")),
        plain("kv_a_layernorm", "attn_kv_a_norm", ("lk",)),
        plain(
            "kv_b_proj",
            "attn_k_b",
            ("kv", "lk"),
            stored_dims=("n", "lk", "nope"),
            transform="latent-keys",
            rows="front",
        ),
        plain(
            "kv_b_proj",
            "attn_v_b",
            ("kv", "lk"),
            stored_dims=("n", "hv", "lk"),
            transform="latent-values",
            rows="back",
        ),
        plain("o_proj", "attn_output", ("d", "nv")),
        norm("mlp", "post_attention_layernorm", "ffn_norm"),
    )


def latent_kinds(config: Any) -> frozenset[str]:
    """Return whether queries come from latents too."""
    return frozenset({"low rank" if config.q_lora_rank else "full rank"})


def _deepseek_kinds(config: Any) -> list[frozenset[str]]:
    return [kinds | latent_kinds(config) for kinds in leading_dense(config)]


_DEEPSEEK3 = Target(
    architecture="deepseek2",
    outer=ends(),
    block=(*_latent_rules(), *dense_or_mixture(scored=True)),
    entries=(RMS_EPSILON, LATENT, *MIXTURE_ENTRIES, *_GROUPS, gating(SIGMOID), constants({"rope_interleave": True})),
    width_key="expert_feed_forward_length",
    latent=True,
)
_DEEPSEEK2 = replace(
    _DEEPSEEK3,
    block=(*_latent_rules(), *dense_or_mixture(scored=False)),
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
        *dense_or_mixture(scored=True),
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
        *dense_or_mixture(scored=True),
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

DEEPSEEK: Mapping[str, GgufFamily] = {
    "deepseek_v3": _DEEPSEEK_FAMILY,
    "deepseek_v2": replace(
        _DEEPSEEK_FAMILY,
        uniform=_DEEPSEEK2,
        requires={"n_group": None, "topk_group": None, "topk_method": "greedy"},
        read_if=is_gated(SOFTMAX, unless_said=True),
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
