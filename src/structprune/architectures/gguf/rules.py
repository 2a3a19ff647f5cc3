"""Rules that several architectures share: norms, linear maps, and the blocks that are made of them."""

from __future__ import annotations

from dataclasses import replace

from structprune.architectures.gguf.description import Rule, Transform
from structprune.types import UnitKind

LLAMA3_FACTORS = ("rope_freqs.weight",)
LENGTH_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")


def linear(
    sublayer: UnitKind | None, source: str, target: str, out: str, inputs: str, transform: Transform = "copy"
) -> tuple[Rule, Rule]:
    """Return the rules of a linear map and of its bias, which not every model has."""
    weight = Rule(
        source=f"{source}.weight",
        target=f"{target}.weight",
        dims=(out, inputs),
        sublayer=sublayer,
        transform=transform,
    )
    bias = replace(weight, source=f"{source}.bias", target=f"{target}.bias", dims=(out,), optional=True)
    return weight, bias


def conv1d(sublayer: UnitKind, source: str, target: str, out: str, inputs: str) -> tuple[Rule, Rule]:
    """Return the rules of a map of GPT-2, whose weight is stored as (inputs, outputs)."""
    weight, bias = linear(sublayer, source, target, out, inputs)
    return replace(weight, dims=(inputs, out), transform="transpose"), replace(bias, optional=False)


def norm(sublayer: UnitKind | None, source: str, target: str, dim: str = "d", transform: Transform = "copy") -> Rule:
    """Return the rule of an RMSNorm."""
    return Rule(
        source=f"{source}.weight", target=f"{target}.weight", dims=(dim,), sublayer=sublayer, transform=transform
    )


def layer_norm(sublayer: UnitKind | None, source: str, target: str, transform: Transform = "copy") -> tuple[Rule, Rule]:
    """Return the rules of a LayerNorm with a bias."""
    weight = norm(sublayer, source, target, transform=transform)
    return weight, replace(weight, source=f"{source}.bias", target=f"{target}.bias", transform="copy")


def ends(
    final: tuple[Rule, ...] | None = None, *, embedding: str = "model.embed_tokens", head_bias: bool = False
) -> tuple[Rule, ...]:
    """Return the rules of embedding, final norm and head, which is not there where it is the embedding."""
    weight, bias = linear(None, "lm_head", "output", "v", "d")
    return (
        Rule(source=f"{embedding}.weight", target="token_embd.weight", dims=("v", "d")),
        *((norm(None, "model.norm", "output_norm"),) if final is None else final),
        replace(weight, optional=True),
        *((replace(bias, optional=False),) if head_bias else ()),
    )


def attention(rope: Transform = "copy", *, prefix: str = "self_attn.", output: str = "o_proj") -> tuple[Rule, ...]:
    """Return the rules of grouped-query attention with maps of its own for queries, keys and values."""
    return (
        *linear("attention", f"{prefix}q_proj", "attn_q", "q", "d", rope),
        *linear("attention", f"{prefix}k_proj", "attn_k", "k", "d", rope),
        *linear("attention", f"{prefix}v_proj", "attn_v", "k", "d"),
        *linear("attention", f"{prefix}{output}", "attn_output", "d", "q"),
    )


def gated_mlp() -> tuple[Rule, ...]:
    """Return the rules of an MLP with gate, up and down."""
    return (*linear("mlp", "mlp.gate_proj", "ffn_gate", "f", "d"), *plain_mlp("mlp.up_proj", "mlp.down_proj"))


def plain_mlp(up: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of an MLP without a gate."""
    return (*linear("mlp", up, "ffn_up", "f", "d"), *linear("mlp", down, "ffn_down", "d", "f"))


def gated_block(rope: Transform = "copy") -> tuple[Rule, ...]:
    """Return the rules for RMSNorm, grouped-query attention and gated MLP: LLaMA, Mistral, Qwen2."""
    return (
        norm("attention", "input_layernorm", "attn_norm"),
        *attention(rope),
        norm("mlp", "post_attention_layernorm", "ffn_norm"),
        *gated_mlp(),
    )


def head_norms(query: str = "self_attn.q_norm", key: str = "self_attn.k_norm") -> tuple[Rule, Rule]:
    """Return the rules of norms over single heads."""
    return norm("attention", query, "attn_q_norm", "h"), norm("attention", key, "attn_k_norm", "h")


def bare(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules without those of biases that a model may have."""
    return tuple(rule for rule in rules if not rule.optional)


def shifted(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules with norms that stock code applies as 1 + weight."""
    return tuple(replace(rule, transform="plus-one") if rule.source.endswith("norm.weight") else rule for rule in rules)


def biased(rules: tuple[Rule, ...], *names: str) -> tuple[Rule, ...]:
    """Return the rules with biases that are always there: all of them, or those of these maps."""
    return tuple(
        replace(rule, optional=False) if not names or rule.source.rpartition(".")[0] in names else rule
        for rule in rules
    )


def expert_maps(module: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Rule, ...]:
    """Return the rules of the experts of a mixture, whose maps are stacked in the file."""
    maps = ((gate, "ffn_gate_exps", ("f", "d")), (up, "ffn_up_exps", ("f", "d")), (down, "ffn_down_exps", ("d", "f")))
    return tuple(
        Rule(source=f"{module}.{{}}.{source}.weight", target=f"{target}.weight", dims=dims, sublayer="mlp", stacked="e")
        for source, target, dims in maps
    )


def router(source: str) -> Rule:
    """Return the rule of a mixture's router."""
    return Rule(source=f"{source}.weight", target="ffn_gate_inp.weight", dims=("e", "d"), sublayer="mlp", float32=True)


SEPARATE_WIDTHS = {
    "q": ("self_attn.q_proj.weight", 0),
    "k": ("self_attn.k_proj.weight", 0),
    "f": ("mlp.up_proj.weight", 0),
}
INPUT_BIASES = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
OUTPUT_BIAS = "self_attn.o_proj.bias"
GATED_BIASES = ("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias")
