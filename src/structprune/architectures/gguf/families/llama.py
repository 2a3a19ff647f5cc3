"""LLaMA's block and those close to it: RMSNorm, rotary positions, gated MLP.

A family has a native target for blocks of one width, and where llama.cpp has an architecture with per-block widths that
computes the same, a second one: `deci` (LLaMA with a list per width) and `openelm` (Qwen3's block, tied embeddings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from structprune.architectures.gguf.description import Entry, GgufFamily, Target
from structprune.architectures.gguf.entries import HEAD_SIZE, RMS_EPSILON, ROTARY, constants, whole
from structprune.architectures.gguf.rules import (
    GATED_BIASES,
    INPUT_BIASES,
    LLAMA3_FACTORS,
    OUTPUT_BIAS,
    SEPARATE_WIDTHS,
    ends,
    expert_maps,
    gated_block,
    head_norms,
    router,
)

USUAL: tuple[Entry, ...] = (RMS_EPSILON, HEAD_SIZE, ROTARY)
"""Entries of an architecture with RMSNorm, a size of heads and rotary positions."""

LLAMA_TARGET = Target(
    architecture="llama",
    outer=ends(),
    block=gated_block("interleave"),
    entries=USUAL,
    rope_factors=LLAMA3_FACTORS,
)
_DECI = replace(LLAMA_TARGET, architecture="deci", lists_widths=True, skips_attention=True)
_QWEN2 = Target(architecture="qwen2", outer=ends(), block=gated_block(), entries=USUAL, even_heads=True)
_QWEN3 = replace(_QWEN2, architecture="qwen3", block=(*gated_block(), *head_norms()), even_heads=False)
_EXPERTS = (
    whole("feed_forward_length", "intermediate_size", 1),
    whole("expert_used_count", "num_experts_per_tok"),
)
_QWEN3_MOE = replace(
    _QWEN3,
    architecture="qwen3moe",
    block=(
        *(rule for rule in _QWEN3.block if not rule.source.startswith("mlp.")),
        router("mlp.gate"),
        *expert_maps("mlp.experts"),
    ),
    entries=(*USUAL, *_EXPERTS),
    width_key="expert_feed_forward_length",
)
_OPENELM = replace(
    _QWEN3,
    architecture="openelm",
    outer=ends()[:2],
    # No biases, and the three projections in one.
    block=tuple(
        replace(rule, target="attn_qkv.weight")
        if rule.target in ("attn_q.weight", "attn_k.weight", "attn_v.weight")
        else rule
        for rule in _QWEN3.block
        if not rule.optional
    ),
    lists_widths=True,
    needs_tied=True,
)

GATED = GgufFamily(
    blocks="model.layers.", activations=("silu",), widths=SEPARATE_WIDTHS, uniform=LLAMA_TARGET, window="caps-context"
)
"""A family whose maps have the names of LLaMA's."""
ATTENTION_AND_MLP_BIASES = {"attention_bias": (*INPUT_BIASES, OUTPUT_BIAS), "mlp_bias": GATED_BIASES}
_NO_WINDOW = constants({"use_sliding_window": False, "sliding_window": None})

LLAMA_LIKE: Mapping[str, GgufFamily] = {
    "llama": replace(
        GATED,
        uneven=_DECI,
        biases=ATTENTION_AND_MLP_BIASES,
        # LlamaConfig wants heads that share out the hidden size; Mistral's is the same block without that check.
        read_if=lambda reading: not reading.sizes.experts and reading.sizes.hidden % reading.sizes.heads == 0,
    ),
    "mistral": replace(
        GATED,
        uniform=replace(LLAMA_TARGET, entries=(*USUAL, constants({"sliding_window": None}))),
        uneven=_DECI,
        read_if=lambda reading: not reading.sizes.experts,
    ),
    "qwen2": replace(
        GATED,
        uniform=replace(_QWEN2, entries=(*USUAL, _NO_WINDOW)),
        uneven=_DECI,
        biases={"": INPUT_BIASES},
    ),
    "qwen3": replace(
        GATED,
        uniform=replace(_QWEN3, entries=(*USUAL, _NO_WINDOW, constants({"attention_bias": False}))),
        uneven=_OPENELM,
    ),
    "qwen3_moe": replace(
        GATED,
        uniform=replace(_QWEN3_MOE, entries=(*_QWEN3_MOE.entries, _NO_WINDOW, constants({"attention_bias": False}))),
        widths=SEPARATE_WIDTHS | {"f": ("mlp.experts.0.up_proj.weight", 0)},
        names={"intermediate_size": "moe_intermediate_size", "head_dim": "head_dim"},
        # llama.cpp takes the weights of the chosen experts as shares of their sum.
        requires={"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
}
"""`config.model_type` -> its description."""
