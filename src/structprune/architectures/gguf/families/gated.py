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
from structprune.architectures.gguf.families.llama import ATTENTION_AND_MLP_BIASES, GATED, LLAMA_TARGET, USUAL
from structprune.architectures.gguf.rules import (
    INPUT_BIASES,
    LLAMA3_FACTORS,
    OUTPUT_BIAS,
    SEPARATE_WIDTHS,
    attention,
    bare,
    ends,
    gated_block,
    gated_mlp,
    head_norms,
    norm,
    plain_mlp,
)
from structprune.errors import UnsupportedError

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

# llama.cpp knows the model with attention windows by its blocks, and gives windows to no other.
_WINDOWED_BLOCKS = 64


def _exaone4_windows() -> Entry:
    some, none = windows(4, 4096), windows(4, may_lack=True, none_says_so=True)

    def check(windowed: bool, blocks: int, where: str | None = None) -> None:
        if windowed != (blocks == _WINDOWED_BLOCKS):
            raise UnsupportedError(
                f"llama.cpp's exaone4 has attention windows with {_WINDOWED_BLOCKS} blocks, and with no other number",
                where=where,
                got=f"{blocks} blocks {'with' if windowed else 'without'} windows",
            )

    def read(reading: GgufReading) -> Mapping[str, Any]:
        blocks = reading.sizes.blocks
        if blocks == _WINDOWED_BLOCKS:
            return some.read(reading)
        values = none.read(reading)
        check(values["sliding_window"] is not None, blocks, reading.fields.where)
        return values

    def write(model: GgufModel) -> Mapping[str, Value]:
        windowed = "sliding_attention" in model.layer_types()
        check(windowed, len(model.blocks))
        return some.write(model) if windowed else {}

    return Entry(read=read, write=write)


_EXAONE4 = Target(
    architecture="exaone4",
    outer=ends(),
    block=(*bare((*attention(), *gated_mlp())), *head_norms(), *_POST_NORMS),
    entries=(*USUAL, _exaone4_windows()),
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
    widths=SEPARATE_WIDTHS | {"f": ("mlp.down_proj.weight", 1)},
    biases={"attention_bias": INPUT_BIASES},
)

_NO_BIASES = constants({"attention_bias": False, "mlp_bias": False})
_ARCEE = Target(
    architecture="arcee",
    outer=ends(),
    block=(
        norm("attention", "input_layernorm", "attn_norm"),
        *bare(attention("interleave")),
        norm("mlp", "post_attention_layernorm", "ffn_norm"),
        *bare(plain_mlp("mlp.up_proj", "mlp.down_proj")),
    ),
    entries=(*USUAL, _NO_BIASES),
    rope_factors=LLAMA3_FACTORS,
)
_ERNIE = Target(architecture="ernie4_5", outer=ends(), block=bare(gated_block()), entries=USUAL)
_SEED_OSS = Target(
    architecture="seed_oss",
    outer=ends(),
    block=(
        norm("attention", "input_layernorm", "attn_norm"),
        *(rule for rule in attention() if rule.source != OUTPUT_BIAS),
        norm("mlp", "post_attention_layernorm", "post_attention_norm"),
        *bare(gated_mlp()),
    ),
    entries=(*USUAL, constants({"attention_out_bias": False, "mlp_bias": False})),
)
_HUNYUAN = Target(
    architecture="hunyuan-dense",
    outer=ends(),
    block=(
        *bare(gated_block()),
        *head_norms("self_attn.query_layernorm", "self_attn.key_layernorm"),
    ),
    entries=(*USUAL, constants({"attention_bias": False})),
)
# The same block under other names: a file of it is read as LLaMA's.
_WRITTEN_AS_LLAMA = replace(
    GATED, uniform=LLAMA_TARGET, biases=ATTENTION_AND_MLP_BIASES, window="any", read_if=lambda _: False
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
    "arcee": replace(GATED, uniform=_ARCEE, activations=("relu2",)),
    "ernie4_5": replace(GATED, uniform=_ERNIE, requires={"use_bias": False}),
    "seed_oss": replace(GATED, uniform=_SEED_OSS, biases={"attention_bias": INPUT_BIASES}),
    "hunyuan_v1_dense": replace(GATED, uniform=_HUNYUAN),
    "internlm3": _WRITTEN_AS_LLAMA,
    "iquestcoder": _WRITTEN_AS_LLAMA,
    "glm4": _GLM_FAMILY,
    "glm": replace(_GLM_FAMILY, uniform=_GLM),
}
"""`config.model_type` -> its description."""
