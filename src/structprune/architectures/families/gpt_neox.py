"""GPT-NeoX and Pythia: LayerNorm, partial rotary positions, both sublayers of a block beside each other.

The fused map holds query, key and value of one head after the other, so a head is one run of rows. With
`use_parallel_residual` a block is `h += attention(norm(h)) + mlp(norm'(h))`, else one sublayer follows the other.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from structprune.architectures.families.common import only_kv_groups
from structprune.architectures.family import Family, StockClasses, one_after_the_other
from structprune.types import AxisSlice, HeadUnits, Stage, SublayerKind, UnitGroup

_NORMS: Mapping[SublayerKind, tuple[str, ...]] = {
    "attention": ("input_layernorm",),
    "mlp": ("post_attention_layernorm",),
}


def _stages(config: PretrainedConfig) -> tuple[Stage, ...]:
    return (("attention", "mlp"),) if config.use_parallel_residual else one_after_the_other(config)


def _groups(config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
    only_kv_groups(head_units, "GPT-NeoX")
    head_dim = config.hidden_size // config.num_attention_heads
    mlp = UnitGroup(
        kind="mlp",
        num_units=config.intermediate_size,
        width=1,
        producers=tuple(AxisSlice(tensor=f"mlp.dense_h_to_4h.{part}", axis=0) for part in ("weight", "bias")),
        consumer=AxisSlice(tensor="mlp.dense_4h_to_h.weight", axis=1),
        consumer_module="mlp.dense_4h_to_h",
        consumer_bias="mlp.dense_4h_to_h.bias",
        config_fields={"intermediate_size": 1},
        module_prefix="mlp.",
        up_module="mlp.dense_h_to_4h",
        activation=config.hidden_act,
        norm_modules=_NORMS["mlp"],
    )
    attention = UnitGroup(
        kind="attention",
        num_units=config.num_attention_heads,
        width=head_dim,
        producers=tuple(
            AxisSlice(tensor=f"attention.query_key_value.{part}", axis=0, width=3 * head_dim)
            for part in (("weight", "bias") if config.attention_bias else ("weight",))
        ),
        consumer=AxisSlice(tensor="attention.dense.weight", axis=1, width=head_dim),
        consumer_module="attention.dense",
        consumer_bias="attention.dense.bias" if config.attention_bias else None,
        # Stock GPT-NeoX derives both maps from the hidden size, so no config entry can express fewer heads.
        config_fields={},
        module_prefix="attention.",
        norm_modules=_NORMS["attention"],
    )
    return (mlp, attention)


GPT_NEOX = Family(
    name="gpt_neox",
    blocks_module="gpt_neox.layers",
    embedding_modules=("gpt_neox.embed_in",),
    rotary_module="gpt_neox.rotary_emb",
    final_norm_module="gpt_neox.final_layer_norm",
    head_module="lm_head",
    attention_module="attention",
    mlp_modules=("mlp",),
    norms=_NORMS,
    classes={
        "gpt_neox": StockClasses(
            module="gpt_neox", stem="GPTNeoX", layer="GPTNeoXLayer", chain=("GPTNeoXModel", "GPTNeoXForCausalLM")
        )
    },
    groups=_groups,
    stages=_stages,
    renamed={"embed_out.": "lm_head."},
)
