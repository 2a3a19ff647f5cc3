"""Gemma: norms are applied as 1 + weight, and the head is always the embedding."""

from __future__ import annotations

from collections.abc import Mapping

from structprune.architectures.gguf.description import Entry, GgufFamily, Rule, Target
from structprune.architectures.gguf.entries import (
    HEAD_SIZE,
    RMS_EPSILON,
    SOFT_CAPS,
    constants,
    local_rotary,
    number,
    one_base,
    query_scale,
    windows,
)
from structprune.architectures.gguf.families.llama import USUAL
from structprune.architectures.gguf.rules import SEPARATE_WIDTHS, bare, ends, gated_block, head_norms, norm, shifted

GELU_TANH = "gelu_pytorch_tanh"


_SANDWICH = (
    *(rule for rule in gated_block() if rule.source != "post_attention_layernorm.weight"),
    norm("attention", "post_attention_layernorm", "post_attention_norm"),
    norm("mlp", "pre_feedforward_layernorm", "ffn_norm"),
    norm("mlp", "post_feedforward_layernorm", "post_ffw_norm"),
)


def _gemma(architecture: str, block: tuple[Rule, ...], *entries: Entry) -> GgufFamily:
    outer = shifted(ends()[:2])
    return GgufFamily(
        blocks="model.layers.",
        activations=(GELU_TANH,),
        widths=SEPARATE_WIDTHS,
        uniform=Target(
            architecture=architecture, outer=outer, block=shifted(bare(block)), entries=entries, needs_tied=True
        ),
    )


_NO_BIAS = constants({"attention_bias": False})
GEMMA: Mapping[str, GgufFamily] = {
    "gemma": _gemma("gemma", gated_block(), *USUAL, _NO_BIAS),
    "gemma2": _gemma("gemma2", _SANDWICH, *USUAL, _NO_BIAS, query_scale(46), windows(2, 4096), one_base(), SOFT_CAPS),
    "gemma3_text": _gemma(
        "gemma3",
        (*_SANDWICH, *head_norms()),
        RMS_EPSILON,
        HEAD_SIZE,
        _NO_BIAS,
        query_scale(62),
        windows(6, may_lack=True),
        local_rotary(10000.0),
        constants({"attn_logit_softcapping": None}),
        number("final_logit_softcapping", "final_logit_softcapping", 0.0, off=None),
    ),
}
"""`config.model_type` -> its description."""
