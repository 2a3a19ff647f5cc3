"""Which GGUF architecture holds which family, tensor by tensor: data only, for reading files and for writing them.

A family has a native target for blocks of one width, and where llama.cpp has an architecture with per-block widths that
computes the same, a second one: `deci` (LLaMA with a list per width) and `openelm` (Qwen3's block, tied embeddings).
What each was checked against: tests/e2e/test_gguf.py runs every row of this file.

Dimensions: d hidden size, q query heads times head size, k KV heads times head size, f MLP channels (of one expert in a
mixture), h head size, e experts, v vocabulary, p positions, 2f and q+2k fused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from structprune.types import UnitKind

Transform = Literal["copy", "interleave", "plus-one", "transpose", "ungroup"]
"""interleave: rows of a head from (first half, second half) to pairs, as llama.cpp's NORM rotary positions want
them; plus-one: norms that stock code applies as 1 + weight; transpose: Conv1D; ungroup: from query, key and value of
one head after the other to those of all heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One checkpoint tensor and its place. Rules with the same target are joined along the rows, in order."""

    source: str
    """Name in the checkpoint, relative to the block or, outside the blocks, whole."""
    target: str
    """Name in the file, relative to `blk.N.` or whole."""
    dims: tuple[str, ...]
    """Dimensions as stored in the checkpoint."""
    sublayer: UnitKind | None = None
    transform: Transform = "copy"
    optional: bool = False
    """Biases that not every model has."""
    float32: bool = False
    """Not stored in the file's dtype although it has two dimensions."""
    stacked: bool = False
    """One tensor of each expert in the checkpoint, whose number stands for `{}`; all of them, stacked, in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An architecture of llama.cpp as far as one family uses it."""

    architecture: str
    outer: tuple[Rule, ...]
    block: tuple[Rule, ...]
    metadata: tuple[str, ...]
    """Names of the entries of exporters/gguf/metadata.py beside those that every file has."""
    lists_widths: bool = False
    """Widths are written as one number per block."""
    skips_attention: bool = False
    """A block other than the first may have no heads."""
    rope_factors: tuple[str, ...] = ()
    """Tensors with factors of the rotary frequencies that it reads: LLaMA 3's, or those for short and long texts."""
    needs_tied: bool = False
    """The head is always the embedding."""
    even_heads: bool = False
    """Heads times head size is always the hidden size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFamily:
    """One `model_type`."""

    blocks: str
    """Checkpoint prefix of the blocks, with the final dot."""
    activations: tuple[str, ...]
    """The values of `hidden_act` that the architectures compute; all GELUs are one to llama.cpp, by tanh."""
    widths: Mapping[str, tuple[str, int]]
    """Dimension -> (tensor of a block, axis) that it is read from; the others follow from the config."""
    uniform: Target
    uneven: Target | None = None
    window: Literal["none", "caps-context", "alternating", "five-of-six"] = "none"
    """How a sliding window is treated: the target has none and is right within one window, or has this pattern."""
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Config entry -> biases of a block that stock code has together, by their names in the checkpoint; an entry
    without a name is one that is always on."""
    requires: Mapping[str, object] = field(default_factory=dict[str, object])
    """Config entries that the architectures take for granted -> value."""


def _linear(
    sublayer: UnitKind, source: str, target: str, out: str, inputs: str, transform: Transform = "copy"
) -> tuple[Rule, Rule]:
    return (
        Rule(
            source=f"{source}.weight",
            target=f"{target}.weight",
            dims=(out, inputs),
            sublayer=sublayer,
            transform=transform,
        ),
        Rule(
            source=f"{source}.bias",
            target=f"{target}.bias",
            dims=(out,),
            sublayer=sublayer,
            transform=transform,
            optional=True,
        ),
    )


def _norm(sublayer: UnitKind | None, source: str, target: str, dim: str = "d", transform: Transform = "copy") -> Rule:
    return Rule(
        source=f"{source}.weight", target=f"{target}.weight", dims=(dim,), sublayer=sublayer, transform=transform
    )


def _outer(norm: Transform = "copy") -> tuple[Rule, ...]:
    return (
        Rule(source="model.embed_tokens.weight", target="token_embd.weight", dims=("v", "d")),
        _norm(None, "model.norm", "output_norm", transform=norm),
        Rule(source="lm_head.weight", target="output.weight", dims=("v", "d"), optional=True),
    )


def _gated_block(rope: Transform) -> tuple[Rule, ...]:
    """Return the rules for RMSNorm, grouped-query attention and gated MLP: LLaMA, Mistral, Qwen2."""
    return (
        _norm("attention", "input_layernorm", "attn_norm"),
        *_linear("attention", "self_attn.q_proj", "attn_q", "q", "d", rope),
        *_linear("attention", "self_attn.k_proj", "attn_k", "k", "d", rope),
        *_linear("attention", "self_attn.v_proj", "attn_v", "k", "d"),
        *_linear("attention", "self_attn.o_proj", "attn_output", "d", "q"),
        _norm("mlp", "post_attention_layernorm", "ffn_norm"),
        *_linear("mlp", "mlp.gate_proj", "ffn_gate", "f", "d"),
        *_linear("mlp", "mlp.up_proj", "ffn_up", "f", "d"),
        *_linear("mlp", "mlp.down_proj", "ffn_down", "d", "f"),
    )


_WIDTHS = {
    "q": ("self_attn.q_proj.weight", 0),
    "k": ("self_attn.k_proj.weight", 0),
    "f": ("mlp.up_proj.weight", 0),
}
_ROTARY = ("rms_epsilon", "head_size", "rotary")
LLAMA3_FACTORS = ("rope_freqs.weight",)
LENGTH_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")

_LLAMA = Target(
    architecture="llama",
    outer=_outer(),
    block=_gated_block("interleave"),
    metadata=_ROTARY,
    rope_factors=LLAMA3_FACTORS,
)
_DECI = replace(_LLAMA, architecture="deci", lists_widths=True, skips_attention=True)
_QWEN2 = Target(architecture="qwen2", outer=_outer(), block=_gated_block("copy"), metadata=_ROTARY, even_heads=True)
_HEAD_NORMS = (
    _norm("attention", "self_attn.q_norm", "attn_q_norm", "h"),
    _norm("attention", "self_attn.k_norm", "attn_k_norm", "h"),
)
_QWEN3 = replace(_QWEN2, architecture="qwen3", block=(*_gated_block("copy"), *_HEAD_NORMS), even_heads=False)
_QWEN3_MOE = replace(
    _QWEN3,
    architecture="qwen3moe",
    block=(
        *(rule for rule in _QWEN3.block if not rule.source.startswith("mlp.")),
        Rule(source="mlp.gate.weight", target="ffn_gate_inp.weight", dims=("e", "d"), sublayer="mlp", float32=True),
        *(
            Rule(
                source=f"mlp.experts.{{}}.{source}.weight",
                target=f"{target}.weight",
                dims=dims,
                sublayer="mlp",
                stacked=True,
            )
            for source, target, dims in (
                ("gate_proj", "ffn_gate_exps", ("f", "d")),
                ("up_proj", "ffn_up_exps", ("f", "d")),
                ("down_proj", "ffn_down_exps", ("d", "f")),
            )
        ),
    ),
    metadata=(*_ROTARY, "experts"),
)
_OPENELM = replace(
    _QWEN3,
    architecture="openelm",
    outer=_outer()[:2],
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

_LLAMA_FAMILY = GgufFamily(
    blocks="model.layers.", activations=("silu",), widths=_WIDTHS, uniform=_LLAMA, uneven=_DECI, window="caps-context"
)
_INPUT_BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
_MLP_BIASES = ("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias")


def _gemma(architecture: str, metadata: tuple[str, ...], *, sandwich: bool, head_norms: bool) -> Target:
    """Build Gemma's target: norms are applied as 1 + weight, and the head is always the embedding."""
    shift: Transform = "plus-one"
    rules = [
        replace(rule, transform=shift) if rule.source.endswith("norm.weight") else rule
        for rule in (*_gated_block("copy"), *(_HEAD_NORMS if head_norms else ()))
        if not rule.optional and rule.source != "post_attention_layernorm.weight"
    ]
    if sandwich:
        rules += [
            _norm("attention", "post_attention_layernorm", "post_attention_norm", transform=shift),
            _norm("mlp", "pre_feedforward_layernorm", "ffn_norm", transform=shift),
            _norm("mlp", "post_feedforward_layernorm", "post_ffw_norm", transform=shift),
        ]
    else:
        rules.append(_norm("mlp", "post_attention_layernorm", "ffn_norm", transform=shift))
    return Target(
        architecture=architecture, outer=_outer(shift)[:2], block=tuple(rules), metadata=metadata, needs_tied=True
    )


_GELU_TANH = "gelu_pytorch_tanh"

_PHI3 = Target(
    architecture="phi3",
    even_heads=True,
    outer=_outer(),
    block=(
        _norm("attention", "input_layernorm", "attn_norm"),
        Rule(source="self_attn.qkv_proj.weight", target="attn_qkv.weight", dims=("q+2k", "d"), sublayer="attention"),
        Rule(source="self_attn.o_proj.weight", target="attn_output.weight", dims=("d", "q"), sublayer="attention"),
        _norm("mlp", "post_attention_layernorm", "ffn_norm"),
        Rule(source="mlp.gate_up_proj.weight", target="ffn_up.weight", dims=("2f", "d"), sublayer="mlp"),
        Rule(source="mlp.down_proj.weight", target="ffn_down.weight", dims=("d", "f"), sublayer="mlp"),
    ),
    metadata=("rms_epsilon", "rotary", "original_context", "sliding_window"),
    rope_factors=LENGTH_FACTORS,
)


def _conv1d(sublayer: UnitKind, source: str, target: str, out: str, inputs: str) -> tuple[Rule, Rule]:
    weight, bias = _linear(sublayer, source, target, out, inputs)
    return replace(weight, dims=(inputs, out), transform="transpose"), replace(bias, optional=False)


def _layer_norm(sublayer: UnitKind | None, source: str, target: str) -> tuple[Rule, Rule]:
    weight = _norm(sublayer, source, target)
    return weight, replace(weight, source=f"{source}.bias", target=f"{target}.bias")


_GPT2 = Target(
    architecture="gpt2",
    outer=(
        Rule(source="transformer.wte.weight", target="token_embd.weight", dims=("v", "d")),
        Rule(source="transformer.wpe.weight", target="position_embd.weight", dims=("p", "d"), float32=True),
        *_layer_norm(None, "transformer.ln_f", "output_norm"),
        Rule(source="lm_head.weight", target="output.weight", dims=("v", "d"), optional=True),
    ),
    block=(
        *_layer_norm("attention", "ln_1", "attn_norm"),
        *_conv1d("attention", "attn.c_attn", "attn_qkv", "q+2k", "d"),
        *_conv1d("attention", "attn.c_proj", "attn_output", "d", "q"),
        *_layer_norm("mlp", "ln_2", "ffn_norm"),
        *_conv1d("mlp", "mlp.c_fc", "ffn_up", "f", "d"),
        *_conv1d("mlp", "mlp.c_proj", "ffn_down", "d", "f"),
    ),
    metadata=("layer_norm_epsilon",),
)

_GPT_NEOX = Target(
    architecture="gptneox",
    outer=(
        Rule(source="gpt_neox.embed_in.weight", target="token_embd.weight", dims=("v", "d")),
        *_layer_norm(None, "gpt_neox.final_layer_norm", "output_norm"),
        Rule(source="lm_head.weight", target="output.weight", dims=("v", "d")),
    ),
    block=tuple(
        # llama.cpp wants the biases that a config may leave out.
        replace(rule, optional=False)
        for rule in (
            *_layer_norm("attention", "input_layernorm", "attn_norm"),
            *_linear("attention", "attention.query_key_value", "attn_qkv", "q+2k", "d", "ungroup"),
            *_linear("attention", "attention.dense", "attn_output", "d", "q"),
            *_layer_norm("mlp", "post_attention_layernorm", "ffn_norm"),
            *_linear("mlp", "mlp.dense_h_to_4h", "ffn_up", "f", "d"),
            *_linear("mlp", "mlp.dense_4h_to_h", "ffn_down", "d", "f"),
        )
    ),
    metadata=("layer_norm_epsilon", "rotary", "parallel_residual"),
)

GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "llama": replace(
        _LLAMA_FAMILY,
        biases={"attention_bias": (*_INPUT_BIASES, "self_attn.o_proj.bias"), "mlp_bias": _MLP_BIASES},
    ),
    "mistral": _LLAMA_FAMILY,
    "qwen2": replace(_LLAMA_FAMILY, uniform=_QWEN2, biases={"": _INPUT_BIASES}),
    "qwen3": replace(_LLAMA_FAMILY, uniform=_QWEN3, uneven=_OPENELM),
    "qwen3_moe": replace(
        _LLAMA_FAMILY,
        uniform=_QWEN3_MOE,
        uneven=None,
        widths=_WIDTHS | {"f": ("mlp.experts.0.up_proj.weight", 0)},
        # llama.cpp takes the weights of the chosen experts as shares of their sum.
        requires={"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    "gemma": GgufFamily(
        blocks="model.layers.",
        activations=(_GELU_TANH,),
        widths=_WIDTHS,
        uniform=_gemma("gemma", _ROTARY, sandwich=False, head_norms=False),
    ),
    "gemma2": GgufFamily(
        blocks="model.layers.",
        activations=(_GELU_TANH,),
        widths=_WIDTHS,
        uniform=_gemma("gemma2", (*_ROTARY, "sliding_window", "soft_caps"), sandwich=True, head_norms=False),
        window="alternating",
    ),
    "gemma3_text": GgufFamily(
        blocks="model.layers.",
        activations=(_GELU_TANH,),
        widths=_WIDTHS,
        uniform=_gemma("gemma3", (*_ROTARY, "sliding_window", "local_rotary"), sandwich=True, head_norms=True),
        window="five-of-six",
    ),
    "phi3": GgufFamily(
        blocks="model.layers.",
        activations=("silu",),
        widths={"q": ("self_attn.o_proj.weight", 1), "f": ("mlp.down_proj.weight", 1)},
        uniform=_PHI3,
        window="caps-context",
    ),
    "gpt2": GgufFamily(
        blocks="transformer.h.",
        activations=("gelu_new", _GELU_TANH, "gelu_fast"),
        widths={"q": ("attn.c_proj.weight", 0), "f": ("mlp.c_fc.weight", 1)},
        uniform=_GPT2,
        requires={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "gpt_neox": GgufFamily(
        blocks="gpt_neox.layers.",
        activations=("gelu", "gelu_new", _GELU_TANH, "gelu_fast"),
        widths={"q": ("attention.dense.weight", 1), "f": ("mlp.dense_h_to_4h.weight", 0)},
        uniform=_GPT_NEOX,
    ),
}
"""`config.model_type` -> where its tensors go."""
