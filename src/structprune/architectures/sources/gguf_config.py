"""What each architecture of llama.cpp is in transformers: config entries from the metadata of a GGUF file.

One function per architecture, in the table `READINGS`; what it does not take of the file ends the run (gguf_fields.py).
Where a file is silent, llama.cpp's own default counts, for that is what the file computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from structprune.architectures import FAMILIES
from structprune.architectures.sources.gguf_families import GGUF_FAMILIES
from structprune.architectures.sources.gguf_fields import GgufFields
from structprune.architectures.sources.gguf_rope import read_rope
from structprune.errors import CheckpointError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSizes:
    """Numbers that tensors are checked against."""

    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    channels: int
    """Channels of an MLP, or of one expert."""
    positions: int
    experts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufReading:
    """How a file of one architecture is read."""

    model_type: str
    entries: Callable[[GgufFields, GgufSizes], dict[str, Any]]
    """Config entries beside those of every model. Marks what it reads."""
    own_head_size: bool = True
    """Whether heads may have another size than their share of the hidden size."""
    mixture: bool = False


def read_sizes(fields: GgufFields, reading: GgufReading) -> GgufSizes:
    """Read the sizes that every architecture has. Raises CheckpointError for numbers that do not go together."""
    blocks = fields.integer("block_count")
    if blocks > len(fields.header.tensors):
        raise CheckpointError(
            "the GGUF file says more blocks than it has tensors",
            where=fields.where,
            got=f"{fields.architecture}.block_count {blocks}",
            wanted=f"at most {len(fields.header.tensors)}",
        )
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_size = fields.integer("attention.key_length", max(1, hidden // heads))
    values = fields.integer("attention.value_length", head_size if hidden % heads else max(1, hidden // heads))
    if values != head_size or (not reading.own_head_size and head_size * heads != hidden):
        raise UnsupportedError(
            "heads of this size are not those of the architecture",
            where=fields.where,
            got=f"keys of {head_size}, values of {values}, {heads} heads, hidden size {hidden}",
            wanted="keys and values of one size"
            + (", heads that share out the hidden size" if not reading.own_head_size else ""),
        )
    experts, channels = 0, fields.integer("feed_forward_length", 1 if reading.mixture else None)
    if reading.mixture:
        experts = fields.integer("expert_count")
        chosen = fields.integer("expert_used_count", most=experts)
        channels = fields.integer("expert_feed_forward_length", max(1, channels // chosen))
    if experts > len(fields.header.tensors) * 2**16:
        raise CheckpointError("the GGUF file says too many experts", where=fields.where, got=experts)
    return GgufSizes(
        blocks=blocks,
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads, most=heads),
        head_size=head_size,
        channels=channels,
        positions=fields.integer("context_length"),
        experts=experts,
    )


def _factors(fields: GgufFields) -> tuple[str, ...]:
    return GGUF_FAMILIES[READINGS[fields.architecture].model_type].uniform.rope_factors


def _rms(fields: GgufFields, sizes: GgufSizes, activation: str = "silu", *, partial: bool = False) -> dict[str, Any]:
    """Read the entries of the families with RMSNorm, rotary positions and grouped heads."""
    return {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.channels,
        "num_hidden_layers": sizes.blocks,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_size,
        "max_position_embeddings": sizes.positions,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": activation,
        "rope_parameters": read_rope(
            fields, sizes.head_size, sizes.positions, partial=partial, factors=_factors(fields)
        ),
    }


def _llama(fields: GgufFields, sizes: GgufSizes) -> dict[str, Any]:
    if fields.integer("expert_count", 0, least=0):
        raise UnsupportedError(
            "the GGUF file is a mixture of experts of architecture llama (Mixtral), which is no family here",
            where=fields.where,
            got=f"{fields.integer('expert_count')} experts",
            wanted=f"a dense llama, or another of {', '.join(READINGS)}",
        )
    entries = _rms(fields, sizes)
    if sizes.hidden % sizes.heads:
        # LlamaConfig wants heads that share out the hidden size; Mistral's is the same block without that check.
        return entries | {"model_type": "mistral", "sliding_window": None}
    return entries


def _qwen2(fields: GgufFields, sizes: GgufSizes) -> dict[str, Any]:
    entries = _rms(fields, sizes)
    del entries["head_dim"]
    return entries | {"use_sliding_window": False, "sliding_window": None}


def _qwen3(fields: GgufFields, sizes: GgufSizes) -> dict[str, Any]:
    return _rms(fields, sizes) | {"attention_bias": False, "use_sliding_window": False, "sliding_window": None}


def _qwen3_moe(fields: GgufFields, sizes: GgufSizes) -> dict[str, Any]:
    return _qwen3(fields, sizes) | {
        "intermediate_size": fields.integer("feed_forward_length", sizes.channels),
        "moe_intermediate_size": sizes.channels,
        "num_experts": sizes.experts,
        "num_experts_per_tok": fields.integer("expert_used_count"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(fields: GgufFields, sizes: GgufSizes, *, period: int, large_blocks: int) -> dict[str, Any]:
    """Read Gemma 2 or 3; the largest of each, which llama.cpp knows by its blocks, scales queries otherwise."""
    entries = _rms(fields, sizes)
    entries["hidden_activation"] = "gelu_pytorch_tanh"
    del entries["hidden_act"]
    scale = sizes.hidden // sizes.heads if sizes.blocks == large_blocks else sizes.head_size
    windowed = fields.pattern("attention.sliding_window_pattern", sizes.blocks, period)
    return entries | {
        "query_pre_attn_scalar": scale,
        "layer_types": ["sliding_attention" if own else "full_attention" for own in windowed],
        "attention_bias": False,
    }


def _gemma2(fields: GgufFields, sizes: GgufSizes) -> dict[str, Any]:
    entries = _gemma(fields, sizes, period=2, large_blocks=46)
    base = entries["rope_parameters"]["rope_theta"]
    if fields.number("rope.freq_base_swa", base) != base:
        raise UnsupportedError("Gemma 2 turns all of its blocks with one base", where=fields.where)
    return entries | {
        "sliding_window": fields.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0) or None,
    }


def _gemma3(fields: GgufFields, sizes: GgufSizes) -> dict[str, Any]:
    entries = _gemma(fields, sizes, period=6, large_blocks=62)
    window = fields.integer("attention.sliding_window", 0, least=0)
    full = entries["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", 10000.0)}
    if not window:
        entries["layer_types"] = ["full_attention"] * sizes.blocks
    return entries | {
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        # Without a window it is never asked for.
        "sliding_window": window or sizes.positions,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": fields.number("final_logit_softcapping", 0.0) or None,
    }


def _phi3(fields: GgufFields, sizes: GgufSizes) -> dict[str, Any]:
    entries = _rms(fields, sizes, partial=True)
    del entries["head_dim"]
    return entries | {
        "original_max_position_embeddings": fields.integer("rope.scaling.original_context_length", sizes.positions),
        "sliding_window": fields.integer("attention.sliding_window", 0, least=0) or None,
    }


def _gpt2(fields: GgufFields, sizes: GgufSizes) -> dict[str, Any]:
    return {
        "n_embd": sizes.hidden,
        "n_inner": sizes.channels,
        "n_layer": sizes.blocks,
        "n_head": sizes.heads,
        "n_positions": sizes.positions,
        "layer_norm_epsilon": fields.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _gpt_neox(fields: GgufFields, sizes: GgufSizes) -> dict[str, Any]:
    return {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.channels,
        "num_hidden_layers": sizes.blocks,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": sizes.positions,
        "layer_norm_eps": fields.number("attention.layer_norm_epsilon"),
        # The file does not say which GELU; this is the one of the models that there are.
        "hidden_act": "gelu",
        "use_parallel_residual": fields.flag("use_parallel_residual", True),
        "attention_bias": True,
        "rope_parameters": read_rope(fields, sizes.head_size, sizes.positions, partial=True, factors=()),
    }


READINGS: Mapping[str, GgufReading] = {
    "llama": GgufReading(model_type="llama", entries=_llama),
    "qwen2": GgufReading(model_type="qwen2", entries=_qwen2, own_head_size=False),
    "qwen3": GgufReading(model_type="qwen3", entries=_qwen3),
    "qwen3moe": GgufReading(model_type="qwen3_moe", entries=_qwen3_moe, mixture=True),
    "gemma2": GgufReading(model_type="gemma2", entries=_gemma2),
    "gemma3": GgufReading(model_type="gemma3_text", entries=_gemma3),
    "phi3": GgufReading(model_type="phi3", entries=_phi3, own_head_size=False),
    "gpt2": GgufReading(model_type="gpt2", entries=_gpt2, own_head_size=False),
    "gptneox": GgufReading(model_type="gpt_neox", entries=_gpt_neox, own_head_size=False),
}
"""`general.architecture` -> how it is read."""


def read_config(fields: GgufFields) -> tuple[dict[str, Any], GgufSizes]:
    """Read the config without its vocabulary, dtype and biases, and the sizes.

    Raises UnsupportedError for an architecture that is not in READINGS.
    """
    reading = READINGS.get(fields.architecture)
    if reading is None:
        raise UnsupportedError(
            "this GGUF architecture cannot be read",
            where=fields.where,
            got=fields.architecture,
            wanted=", ".join(READINGS),
            do="start from the model's Hugging Face checkpoint",
        )
    sizes = read_sizes(fields, reading)
    config = {"model_type": reading.model_type, **reading.entries(fields, sizes)}
    classes = FAMILIES.get(config["model_type"]).classes[config["model_type"]]
    return {"architectures": [classes.chain[-1]], **config}, sizes
