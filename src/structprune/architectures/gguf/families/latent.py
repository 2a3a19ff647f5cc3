"""Attention whose keys and values come from latents, as DeepSeek and MiniCPM 3 have it.

In files of DeepSeek keys and values of a head are two tensors, the keys' transposed, so that llama.cpp multiplies
queries by them first; a file of an older converter, which has one tensor for both, is refused by that tensor's name.
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
from structprune.architectures.gguf.entries import RMS_EPSILON
from structprune.architectures.gguf.families.llama import GATED
from structprune.architectures.gguf.rope_reading import read_rope
from structprune.architectures.gguf.rope_writing import rope_parameters, write_rope
from structprune.architectures.gguf.rules import LENGTH_FACTORS, bare, ends, gated_mlp, norm
from structprune.errors import UnsupportedError

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


def _plain(source: str, target: str, dims: tuple[str, ...], **more: Any) -> Rule:
    return Rule(source=f"self_attn.{source}.weight", target=f"{target}.weight", dims=dims, sublayer="attention", **more)


_LOW = (
    _plain("q_a_proj", "attn_q_a", ("lq", "d")),
    _plain("q_a_layernorm", "attn_q_a_norm", ("lq",)),
    _plain("q_b_proj", "attn_q_b", ("nk", "lq")),
)
_FROM_STREAM = (
    _plain("kv_a_proj_with_mqa", "attn_kv_a_mqa", ("lk+r", "d")),
    _plain("kv_a_layernorm", "attn_kv_a_norm", ("lk",)),
)
_KEYS = _plain(
    "kv_b_proj", "attn_k_b", ("kv", "lk"), stored_dims=("n", "lk", "nope"), transform="latent-keys", rows="front"
)
_VALUES = _plain(
    "kv_b_proj", "attn_v_b", ("kv", "lk"), stored_dims=("n", "hv", "lk"), transform="latent-values", rows="back"
)
_OUTPUT = _plain("o_proj", "attn_output", ("d", "nv"))
_NORMS = (
    norm("attention", "input_layernorm", "attn_norm"),
    norm("mlp", "post_attention_layernorm", "ffn_norm"),
)
LATENT_BLOCK = (
    *_NORMS,
    *of_kind("low rank", _LOW),
    *of_kind("full rank", (_plain("q_proj", "attn_q", ("nk", "d")),)),
    *_FROM_STREAM,
    _KEYS,
    _VALUES,
    _OUTPUT,
)
"""Rules of DeepSeek's attention and norms."""


def _read_minicpm(reading: GgufReading) -> dict[str, Any]:
    fields, sizes = reading.fields, reading.sizes
    rotated = fields.integer("rope.dimension_count")
    return {
        "q_lora_rank": fields.integer("attention.q_lora_rank"),
        "kv_lora_rank": fields.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": sizes.head_size - rotated,
        "v_head_dim": fields.integer("attention.value_length", max(1, sizes.hidden // sizes.heads)),
        "head_dim": rotated,
        "rope_parameters": read_rope(
            fields, rotated, sizes.positions, partial=False, log_multiplier=False, factors=reading.target.rope_factors
        ),
        "attention_bias": False,
        "mlp_bias": False,
    }


def _write_minicpm(model: GgufModel) -> dict[str, Value]:
    config = model.config
    if not config.q_lora_rank:
        raise UnsupportedError("llama.cpp's minicpm3 has queries from latents", got="q_lora_rank None")
    return {
        **write_rope(model, partial=False, log_multiplier=False),
        "attention.q_lora_rank": int(config.q_lora_rank),
        "attention.kv_lora_rank": int(config.kv_lora_rank),
        "attention.key_length": int(config.qk_nope_head_dim + config.qk_rope_head_dim),
        "attention.value_length": int(config.v_head_dim),
    }


_MINICPM3 = Target(
    architecture="minicpm3",
    outer=ends(),
    block=(
        *_NORMS,
        *_LOW,
        *_FROM_STREAM,
        _plain("kv_b_proj", "attn_kv_b", ("kv", "lk")),
        _OUTPUT,
        *bare(gated_mlp()),
    ),
    entries=(RMS_EPSILON, Entry(read=_read_minicpm, write=_write_minicpm)),
    latent=True,
    no_groups=True,
    rope_factors=LENGTH_FACTORS,
)
LATENTS: Mapping[str, GgufFamily] = {
    "minicpm3": replace(
        GATED,
        uniform=_MINICPM3,
        widths={"f": ("mlp.up_proj.weight", 0)},
        window="any",
        names={"head_dim": ""},
        # Constants of llama.cpp.
        requires={"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
        dims=latent_dims,
    ),
}
"""`config.model_type` -> its description."""
