"""Decoders of GPT's shape: layer norm, and one map for queries, keys and values."""

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
from structprune.architectures.gguf.entries import (
    constants,
    flag,
    layer_norm_epsilon,
    only,
    rotary,
)
from structprune.architectures.gguf.families.gemma import GELU_TANH
from structprune.architectures.gguf.rules import (
    bare,
    biased,
    conv1d,
    ends,
    layer_norm,
    linear,
    norm,
    plain_mlp,
)
from structprune.errors import UnsupportedError

GELUS = ("gelu", "gelu_new", GELU_TANH, "gelu_fast")
"""All of them are one to llama.cpp, by tanh."""
_FUSED_WIDTHS = {"f": ("mlp.dense_h_to_4h.weight", 0)}

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
_STARCODER = replace(
    _GPT2,
    architecture="starcoder",
    block=biased(
        (
            *layer_norm("attention", "ln_1", "attn_norm"),
            *linear("attention", "attn.c_attn", "attn_qkv", "q+2k", "d"),
            *linear("attention", "attn.c_proj", "attn_output", "d", "q"),
            *layer_norm("mlp", "ln_2", "ffn_norm"),
            *plain_mlp("mlp.c_fc", "mlp.c_proj"),
        )
    ),
)
_FALCON_MLP = plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
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
            *_FALCON_MLP,
        )
    ),
    entries=(
        layer_norm_epsilon("layer_norm_eps"),
        rotary(partial=True),
        flag("use_parallel_residual", "use_parallel_residual", True),
        constants({"attention_bias": True}),
    ),
)
_BLOOM = Target(
    architecture="bloom",
    outer=(
        *ends(layer_norm(None, "transformer.ln_f", "output_norm"), embedding="transformer.word_embeddings"),
        *layer_norm(None, "transformer.word_embeddings_layernorm", "token_embd_norm"),
    ),
    block=biased(
        (
            *layer_norm("attention", "input_layernorm", "attn_norm"),
            *linear("attention", "self_attention.query_key_value", "attn_qkv", "q+2k", "d", "ungroup"),
            *linear("attention", "self_attention.dense", "attn_output", "d", "q"),
            *layer_norm("mlp", "post_attention_layernorm", "ffn_norm"),
            *_FALCON_MLP,
        )
    ),
    entries=(layer_norm_epsilon("layer_norm_epsilon"),),
)


def _falcon(reading: GgufReading) -> dict[str, Any]:
    """Read which of Falcon's blocks it is: one KV head and one norm, as 7B has them, or the later kind."""
    two = reading.fields.has_tensor("blk.0.attn_norm_2.weight")
    later = two or reading.sizes.kv_heads > 1
    return {
        "new_decoder_architecture": later,
        "num_ln_in_parallel_attn": (2 if two else 1) if later else None,
        "multi_query": not later,
    }


def _falcon_norms(config: Any) -> list[frozenset[str]]:
    two = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    return [frozenset({"two norms" if two else "one norm"})] * config.num_hidden_layers


def _falcon_kv_heads(config: Any) -> int:
    return 1 if config.multi_query and not config.new_decoder_architecture else config.num_kv_heads


_FALCON = Target(
    architecture="falcon",
    outer=ends(layer_norm(None, "transformer.ln_f", "output_norm"), embedding="transformer.word_embeddings"),
    block=(
        *of_kind("one norm", layer_norm("attention", "input_layernorm", "attn_norm")),
        *of_kind("two norms", layer_norm("attention", "ln_attn", "attn_norm_2")),
        *of_kind("two norms", layer_norm("mlp", "ln_mlp", "attn_norm")),
        *bare(linear("attention", "self_attention.query_key_value", "attn_qkv", "q+2k", "d", "ungroup")),
        *bare(linear("attention", "self_attention.dense", "attn_output", "d", "q")),
        *bare(_FALCON_MLP),
    ),
    entries=(layer_norm_epsilon("layer_norm_epsilon"), rotary(), Entry(read=_falcon, write=lambda _: {})),
    even_heads=True,
)


def _read_mpt(reading: GgufReading) -> dict[str, Any]:
    return {"attn_config": {"clip_qkv": reading.fields.number("attention.clamp_kqv", 0.0) or None}}


def _write_mpt(model: GgufModel) -> dict[str, Value]:
    attention_config = model.config.attn_config
    if attention_config.softmax_scale is not None:
        raise UnsupportedError("llama.cpp's mpt scales scores by the size of heads", got="softmax_scale")
    clamp = {"attention.clamp_kqv": float(attention_config.clip_qkv)} if attention_config.clip_qkv else {}
    return {"attention.max_alibi_bias": 8.0, **clamp}


_MPT = Target(
    architecture="mpt",
    outer=ends((norm(None, "transformer.norm_f", "output_norm"),), embedding="transformer.wte"),
    block=bare(
        (
            norm("attention", "norm_1", "attn_norm"),
            *linear("attention", "attn.Wqkv", "attn_qkv", "q+2k", "d"),
            *linear("attention", "attn.out_proj", "attn_output", "d", "q"),
            norm("mlp", "norm_2", "ffn_norm"),
            *plain_mlp("ffn.up_proj", "ffn.down_proj"),
        )
    ),
    entries=(
        layer_norm_epsilon("layer_norm_epsilon"),
        Entry(read=_read_mpt, write=_write_mpt),
        # Stock code knows no other, and no positions beside it.
        only("attention.max_alibi_bias", 8.0),
    ),
)


def _all_heads(config: Any) -> int:
    return config.num_attention_heads


GPT_LIKE: Mapping[str, GgufFamily] = {
    "gpt2": GgufFamily(
        blocks="transformer.h.",
        activations=("gelu_new", GELU_TANH, "gelu_fast"),
        widths={"q": ("attn.c_proj.weight", 0), "f": ("mlp.c_fc.weight", 1)},
        uniform=_GPT2,
        names={"intermediate_size": "n_inner"},
        requires={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_bigcode": GgufFamily(
        blocks="transformer.h.",
        activations=(GELU_TANH, *GELUS),
        widths={"q": ("attn.c_proj.weight", 1), "f": ("mlp.c_fc.weight", 0)},
        uniform=_STARCODER,
        names={"intermediate_size": "n_inner", "num_key_value_heads": ""},
        requires={"multi_query": True, "scale_attn_weights": True},
        kv_heads=lambda _: 1,
        read_if=lambda reading: reading.sizes.kv_heads == 1,
    ),
    "gpt_neox": GgufFamily(
        blocks="gpt_neox.layers.",
        activations=GELUS,
        widths={"q": ("attention.dense.weight", 1), **_FUSED_WIDTHS},
        uniform=_GPT_NEOX,
    ),
    "bloom": GgufFamily(
        blocks="transformer.h.",
        activations=(),
        widths={"q": ("self_attention.dense.weight", 1), **_FUSED_WIDTHS},
        uniform=_BLOOM,
        mlp_multiple=4,
        kv_heads=_all_heads,
        requires={"apply_residual_connection_post_layernorm": False},
    ),
    "falcon": GgufFamily(
        blocks="transformer.h.",
        activations=GELUS,
        widths={"q": ("self_attention.dense.weight", 1), **_FUSED_WIDTHS},
        uniform=_FALCON,
        names={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
        requires={"alibi": False, "bias": False, "parallel_attn": True},
        kv_heads=_falcon_kv_heads,
        kinds=_falcon_norms,
    ),
    "mpt": GgufFamily(
        blocks="transformer.blocks.",
        activations=(),
        widths={"q": ("attn.out_proj.weight", 1), "f": ("ffn.up_proj.weight", 0)},
        uniform=_MPT,
        mlp_multiple=4,
        kv_heads=_all_heads,
        names={"max_position_embeddings": "max_seq_len"},
    ),
}
"""`config.model_type` -> its description."""
