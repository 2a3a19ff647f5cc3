"""Architectures with RMSNorm and a gated MLP that differ from LLaMA's in factors, norms or positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from structprune.architectures.gguf.description import GgufFamily, GgufModel, GgufReading, Rule, Target, Value
from structprune.architectures.gguf.entries import (
    HEAD_SIZE,
    RMS_EPSILON,
    Entry,
    constants,
    local_rotary,
    number,
    only,
    rotary,
    unturned,
    windows,
)
from structprune.architectures.gguf.families.llama import ATTENTION_AND_MLP_BIASES, GATED, USUAL
from structprune.architectures.gguf.rules import (
    INPUT_BIASES,
    LLAMA3_FACTORS,
    attention,
    bare,
    ends,
    gated_block,
    gated_mlp,
    head_norms,
    norm,
)

SCALES: tuple[Entry, ...] = (
    number("attention.scale", "attention_multiplier", lambda sizes: sizes.head_size**-0.5, zero_is_none=True),
    number("embedding_scale", "embedding_multiplier", 1.0, zero_is_none=True),
    number("residual_scale", "residual_multiplier", 1.0, zero_is_none=True),
    number("logit_scale", "logits_scaling"),
    # The architecture turns no heads where this key says no.
    only("rope.scaling.finetuned", True),
)
"""Entries of Granite's factors."""
_GRANITE = Target(
    architecture="granite",
    outer=ends(),
    block=gated_block("interleave"),
    entries=(*USUAL, *SCALES),
    rope_factors=LLAMA3_FACTORS,
)

_SMOLLM3 = Target(
    architecture="smollm3",
    outer=ends(),
    # Of the biases that the config may ask for, llama.cpp reads those of queries, keys and values alone.
    block=bare(gated_block("interleave")),
    entries=(*USUAL, unturned(4), constants({"sliding_window": None, "attention_bias": False, "mlp_bias": False})),
)


def _temperature() -> Entry:
    """Build the rotary entry of Ministral 3, whose parameters also say how queries grow with their positions."""
    turned = rotary(log_multiplier=True)

    def read(reading: GgufReading) -> dict[str, Any]:
        beta = reading.fields.number("attention.temperature_scale", 0.0)
        parameters = turned.read(reading)["rope_parameters"]
        original = {"original_max_position_embeddings": reading.sizes.positions}
        return {"rope_parameters": {**original, **parameters, "llama_4_scaling_beta": beta}}

    def write(model: GgufModel) -> dict[str, Value]:
        beta = model.config.rope_parameters.get("llama_4_scaling_beta") or 0.0
        return {**turned.write(model), "attention.temperature_scale": float(beta)}

    return Entry(read=read, write=write)


_MINISTRAL3 = Target(
    architecture="mistral3",
    outer=ends(),
    block=gated_block("interleave"),
    entries=(RMS_EPSILON, HEAD_SIZE, _temperature(), constants({"sliding_window": None})),
)

_POST_NORMS = (
    norm("attention", "post_attention_layernorm", "post_attention_norm"),
    norm("mlp", "post_feedforward_layernorm", "post_ffw_norm"),
)
_OLMO2 = Target(
    architecture="olmo2",
    outer=ends(),
    block=(
        *bare((*attention(), *gated_mlp())),
        norm("attention", "self_attn.q_norm", "attn_q_norm", "q"),
        norm("attention", "self_attn.k_norm", "attn_k_norm", "k"),
        *_POST_NORMS,
    ),
    entries=(*USUAL, constants({"attention_bias": False})),
    needs_head=True,
    even_heads=True,
)
_OLMO3 = replace(
    _OLMO2,
    entries=(RMS_EPSILON, HEAD_SIZE, windows(4), local_rotary(), constants({"attention_bias": False})),
)

_EXAONE4 = Target(
    architecture="exaone4",
    outer=ends(),
    block=(*bare((*attention(), *gated_mlp())), *head_norms(), *_POST_NORMS),
    entries=(*USUAL, windows(4, may_lack=True, none_says_so=True)),
    rope_factors=LLAMA3_FACTORS,
)

_FUSED_MLP = (
    Rule(source="mlp.gate_up_proj.weight", target="ffn_up.weight", dims=("2f", "d"), sublayer="mlp"),
    Rule(source="mlp.down_proj.weight", target="ffn_down.weight", dims=("d", "f"), sublayer="mlp"),
)
_GLM4 = Target(
    architecture="glm4",
    outer=ends(),
    block=(
        norm("attention", "input_layernorm", "attn_norm"),
        *attention(),
        norm("attention", "post_self_attn_layernorm", "post_attention_norm"),
        norm("mlp", "post_attention_layernorm", "ffn_norm"),
        *_FUSED_MLP,
        norm("mlp", "post_mlp_layernorm", "post_ffw_norm"),
    ),
    entries=(RMS_EPSILON, HEAD_SIZE, rotary(partial=True)),
)
_GLM = replace(
    _GLM4, architecture="chatglm", block=tuple(rule for rule in _GLM4.block if not rule.target.startswith("post_"))
)
_GLM_FAMILY = replace(
    GATED,
    uniform=_GLM4,
    widths=GATED.widths | {"f": ("mlp.down_proj.weight", 1)},
    biases={"attention_bias": INPUT_BIASES},
)

GATED_FAMILIES: Mapping[str, GgufFamily] = {
    "granite": replace(GATED, uniform=_GRANITE, biases=ATTENTION_AND_MLP_BIASES, names={"head_dim": "head_dim"}),
    "smollm3": replace(
        GATED,
        uniform=_SMOLLM3,
        names={"head_dim": "head_dim"},
        requires={"use_sliding_window": False},
    ),
    "ministral3": replace(GATED, uniform=_MINISTRAL3),
    "olmo3": replace(
        GATED,
        uniform=_OLMO3,
        window="any",
        read_if=lambda reading: bool(reading.fields.raw("attention.sliding_window")),
    ),
    "olmo2": replace(GATED, uniform=_OLMO2),
    "exaone4": replace(GATED, uniform=_EXAONE4, window="any", names={"head_dim": "head_dim"}),
    "glm4": _GLM_FAMILY,
    "glm": replace(_GLM_FAMILY, uniform=_GLM),
}
"""`config.model_type` -> its description."""
