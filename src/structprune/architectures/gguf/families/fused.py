"""Architectures with one map for queries, keys and values, and one for gate and up: Phi-3."""

from __future__ import annotations

from collections.abc import Mapping

from structprune.architectures.gguf.description import GgufFamily, Rule, Target
from structprune.architectures.gguf.entries import LIMITING_WINDOW, ORIGINAL_CONTEXT, RMS_EPSILON, rotary
from structprune.architectures.gguf.rules import LENGTH_FACTORS, ends, norm

_PHI3 = Target(
    architecture="phi3",
    even_heads=True,
    outer=ends(),
    block=(
        norm("attention", "input_layernorm", "attn_norm"),
        Rule(source="self_attn.qkv_proj.weight", target="attn_qkv.weight", dims=("q+2k", "d"), sublayer="attention"),
        Rule(source="self_attn.o_proj.weight", target="attn_output.weight", dims=("d", "q"), sublayer="attention"),
        norm("mlp", "post_attention_layernorm", "ffn_norm"),
        Rule(source="mlp.gate_up_proj.weight", target="ffn_up.weight", dims=("2f", "d"), sublayer="mlp"),
        Rule(source="mlp.down_proj.weight", target="ffn_down.weight", dims=("d", "f"), sublayer="mlp"),
    ),
    entries=(RMS_EPSILON, rotary(partial=True), ORIGINAL_CONTEXT, LIMITING_WINDOW),
    rope_factors=LENGTH_FACTORS,
)

FUSED: Mapping[str, GgufFamily] = {
    "phi3": GgufFamily(
        blocks="model.layers.",
        activations=("silu",),
        widths={"q": ("self_attn.o_proj.weight", 1), "f": ("mlp.down_proj.weight", 1)},
        uniform=_PHI3,
        window="caps-context",
    ),
}
"""`config.model_type` -> its description."""
