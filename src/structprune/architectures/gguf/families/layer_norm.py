"""Decoders with layer norm whose queries, keys and values have maps of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from structprune.architectures.gguf.description import (
    Entry,
    GgufFamily,
    GgufReading,
    Rule,
    Target,
    of_kind,
)
from structprune.architectures.gguf.entries import (
    HEAD_SIZE,
    constants,
    layer_norm_epsilon,
    number,
    one_base,
    only,
    rotary,
    windows,
)
from structprune.architectures.gguf.families.gemma import GELU_TANH
from structprune.architectures.gguf.families.gpt import GELUS
from structprune.architectures.gguf.rules import (
    INPUT_BIASES,
    OUTPUT_BIAS,
    SEPARATE_WIDTHS,
    attention,
    bare,
    biased,
    ends,
    gated_mlp,
    layer_norm,
    norm,
    plain_mlp,
)

_TANH_FIRST = ("gelu_new", GELU_TANH, "gelu_fast", "gelu")

_STARCODER2 = Target(
    architecture="starcoder2",
    outer=ends(layer_norm(None, "model.norm", "output_norm")),
    block=biased(
        (
            *layer_norm("attention", "input_layernorm", "attn_norm"),
            *attention(),
            *layer_norm("mlp", "post_attention_layernorm", "ffn_norm"),
            *plain_mlp("mlp.c_fc", "mlp.c_proj"),
        )
    ),
    entries=(layer_norm_epsilon("norm_epsilon"), rotary(), constants({"sliding_window": None})),
    even_heads=True,
)
_PHI2 = Target(
    architecture="phi2",
    outer=ends(layer_norm(None, "model.final_layernorm", "output_norm"), head_bias=True),
    block=biased(
        (
            *layer_norm("attention", "input_layernorm", "attn_norm"),
            *attention(output="dense"),
            *plain_mlp("mlp.fc1", "mlp.fc2"),
        )
    ),
    entries=(layer_norm_epsilon("layer_norm_eps"), rotary(partial=True)),
    even_heads=True,
    needs_head=True,
)


def _stablelm_kinds(config: Any) -> list[frozenset[str]]:
    own = {"sequential"} if not config.use_parallel_residual else set[str]()
    own |= {"normed heads"} if config.qk_layernorm else set()
    return [frozenset(own)] * config.num_hidden_layers


def _stablelm(reading: GgufReading) -> dict[str, Any]:
    has = reading.fields.has_tensor
    return {
        "use_parallel_residual": not has("blk.0.ffn_norm.weight"),
        "qk_layernorm": has("blk.0.attn_q_norm.weight"),
    }


_STABLELM = Target(
    architecture="stablelm",
    outer=ends(layer_norm(None, "model.norm", "output_norm")),
    block=(
        *layer_norm("attention", "input_layernorm", "attn_norm"),
        *(rule for rule in attention() if rule.source != OUTPUT_BIAS),
        *of_kind("sequential", layer_norm("mlp", "post_attention_layernorm", "ffn_norm")),
        *bare(gated_mlp()),
        *of_kind(
            "normed heads",
            tuple(
                Rule(
                    source=f"self_attn.{name}_layernorm.norms.{{}}.weight",
                    target=f"attn_{name}_norm.weight",
                    dims=("h",),
                    sublayer="attention",
                    float32=True,
                    stacked=count,
                )
                for name, count in (("q", "n"), ("k", "m"))
            ),
        ),
    ),
    entries=(
        layer_norm_epsilon("layer_norm_eps"),
        rotary(partial=True),
        Entry(read=_stablelm, write=lambda _: {}),
    ),
    # Blocks without a norm before the MLP are parallel, whatever it says.
    unused=("use_parallel_residual",),
    even_heads=True,
    needs_head=True,
)

# Of the biases that the config may ask for, llama.cpp reads those of queries, keys and values alone.
_COHERE_BLOCK = (norm("attention", "input_layernorm", "attn_norm"), *bare((*attention(), *gated_mlp())))
_COMMAND_R = Target(
    architecture="command-r",
    outer=ends()[:2],
    block=_COHERE_BLOCK,
    entries=(
        layer_norm_epsilon("layer_norm_eps"),
        rotary(),
        number("logit_scale", "logit_scale", 1.0, zero_is_none=True),
        constants({"attention_bias": False}),
    ),
    needs_tied=True,
    even_heads=True,
)
_COHERE2 = replace(_COMMAND_R, architecture="cohere2", entries=(*_COMMAND_R.entries, windows(4, 4096), one_base()))

_NEMOTRON = Target(
    architecture="nemotron",
    outer=ends(layer_norm(None, "model.norm", "output_norm", "plus-one")),
    block=(
        *layer_norm("attention", "input_layernorm", "attn_norm", "plus-one"),
        *attention(),
        *layer_norm("mlp", "post_attention_layernorm", "ffn_norm", "plus-one"),
        *plain_mlp("mlp.up_proj", "mlp.down_proj"),
    ),
    entries=(layer_norm_epsilon("norm_eps"), HEAD_SIZE, rotary(partial=True)),
    unused=("attention.layer_norm_rms_epsilon",),
    needs_head=True,
)
_JAIS2 = Target(
    architecture="jais2",
    outer=ends(layer_norm(None, "model.norm", "output_norm")),
    block=biased(
        (
            *layer_norm("attention", "input_layernorm", "attn_norm"),
            *attention(),
            *layer_norm("mlp", "post_attention_layernorm", "ffn_norm"),
            *plain_mlp("mlp.up_proj", "mlp.down_proj"),
        )
    ),
    entries=(layer_norm_epsilon("layer_norm_eps"), HEAD_SIZE, rotary()),
)


def _olmo_epsilon() -> Entry:
    """Build the entry of OLMo's epsilon, which stock code has as a constant."""
    key = "attention.layer_norm_epsilon"
    return Entry(read=only(key, 1e-5).read, write=lambda _: {key: 1e-5})


_OLMO = Target(
    architecture="olmo",
    outer=ends(()),
    # Norms without weights have no tensors.
    block=bare((*attention("interleave"), *gated_mlp())),
    entries=(
        _olmo_epsilon(),
        rotary(),
        number("attention.clamp_kqv", "clip_qkv", 0.0, off=None),
        constants({"attention_bias": False}),
    ),
    even_heads=True,
)


_DECODER = GgufFamily(blocks="model.layers.", activations=("silu",), widths=SEPARATE_WIDTHS, uniform=_COMMAND_R)
LAYER_NORM: Mapping[str, GgufFamily] = {
    "starcoder2": replace(
        _DECODER,
        activations=(GELU_TANH, *GELUS),
        widths=SEPARATE_WIDTHS | {"f": ("mlp.c_fc.weight", 0)},
        uniform=_STARCODER2,
        window="caps-context",
        requires={"use_bias": True},
    ),
    "phi": replace(
        _DECODER,
        activations=_TANH_FIRST,
        widths=SEPARATE_WIDTHS | {"f": ("mlp.fc1.weight", 0)},
        uniform=_PHI2,
        requires={"qk_layernorm": False},
    ),
    "stablelm": replace(
        _DECODER,
        uniform=_STABLELM,
        biases={"use_qkv_bias": INPUT_BIASES},
        kinds=_stablelm_kinds,
    ),
    "cohere": replace(_DECODER, uniform=_COMMAND_R, requires={"use_qk_norm": False}),
    "cohere2": replace(_DECODER, uniform=_COHERE2),
    "jais2": replace(
        _DECODER,
        activations=("relu2",),
        uniform=_JAIS2,
        requires={"attention_bias": True, "mlp_bias": True},
    ),
    "olmo": replace(_DECODER, uniform=_OLMO),
    "nemotron": replace(
        _DECODER,
        activations=("relu2",),
        uniform=_NEMOTRON,
        biases={
            "attention_bias": (*INPUT_BIASES, OUTPUT_BIAS),
            "mlp_bias": ("mlp.up_proj.bias", "mlp.down_proj.bias"),
        },
    ),
}
"""`config.model_type` -> its description."""
