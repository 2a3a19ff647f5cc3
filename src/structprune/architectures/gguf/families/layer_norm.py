"""Architectures with LayerNorm: GPT-2, GPT-NeoX, Phi-3's predecessor and the like."""

from __future__ import annotations

from collections.abc import Mapping

from structprune.architectures.gguf.description import GgufFamily, Rule, Target
from structprune.architectures.gguf.entries import constants, flag, layer_norm_epsilon, rotary
from structprune.architectures.gguf.families.gemma import GELU_TANH
from structprune.architectures.gguf.rules import biased, conv1d, ends, layer_norm, linear, plain_mlp

GELUS = ("gelu", "gelu_new", GELU_TANH, "gelu_fast")
"""All of them are one to llama.cpp, by tanh."""

_GPT2 = Target(
    architecture="gpt2",
    outer=(
        *ends(layer_norm(None, "transformer.ln_f", "output_norm"), embedding="transformer.wte"),
        Rule(source="transformer.wpe.weight", target="position_embd.weight", dims=("p", "d"), float32=True),
    ),
    block=(
        *layer_norm("attention", "ln_1", "attn_norm"),
        *conv1d("attention", "attn.c_attn", "attn_qkv", "q+2k", "d"),
        *conv1d("attention", "attn.c_proj", "attn_output", "d", "q"),
        *layer_norm("mlp", "ln_2", "ffn_norm"),
        *conv1d("mlp", "mlp.c_fc", "ffn_up", "f", "d"),
        *conv1d("mlp", "mlp.c_proj", "ffn_down", "d", "f"),
    ),
    entries=(layer_norm_epsilon("layer_norm_epsilon"),),
)

_GPT_NEOX = Target(
    architecture="gptneox",
    outer=ends(layer_norm(None, "gpt_neox.final_layer_norm", "output_norm"), embedding="gpt_neox.embed_in"),
    # llama.cpp wants the biases that a config may leave out.
    block=biased(
        (
            *layer_norm("attention", "input_layernorm", "attn_norm"),
            *linear("attention", "attention.query_key_value", "attn_qkv", "q+2k", "d", "ungroup"),
            *linear("attention", "attention.dense", "attn_output", "d", "q"),
            *layer_norm("mlp", "post_attention_layernorm", "ffn_norm"),
            *plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        )
    ),
    entries=(
        layer_norm_epsilon("layer_norm_eps"),
        rotary(partial=True),
        flag("use_parallel_residual", "use_parallel_residual", True),
        constants({"attention_bias": True}),
    ),
)

LAYER_NORM: Mapping[str, GgufFamily] = {
    "gpt2": GgufFamily(
        blocks="transformer.h.",
        activations=("gelu_new", GELU_TANH, "gelu_fast"),
        widths={"q": ("attn.c_proj.weight", 0), "f": ("mlp.c_fc.weight", 1)},
        uniform=_GPT2,
        names={"intermediate_size": "n_inner"},
        requires={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_neox": GgufFamily(
        blocks="gpt_neox.layers.",
        activations=GELUS,
        widths={"q": ("attention.dense.weight", 1), "f": ("mlp.dense_h_to_4h.weight", 0)},
        uniform=_GPT_NEOX,
    ),
}
"""`config.model_type` -> its description."""
