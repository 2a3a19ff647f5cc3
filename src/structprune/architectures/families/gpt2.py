"""GPT-2: LayerNorm, learned positions, fused c_attn (all queries, all keys, all values), c_fc -> GELU -> c_proj.

The maps are `Conv1D`: weights are (inputs, outputs), so producers lose columns and consumers rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from structprune.architectures.families.common import only_kv_groups
from structprune.architectures.family import Family, StockClasses
from structprune.errors import UnsupportedError
from structprune.types import AxisSlice, HeadUnits, SublayerKind, UnitGroup

_NORMS: Mapping[SublayerKind, tuple[str, ...]] = {"attention": ("ln_1",), "mlp": ("ln_2",)}


def _check(config: PretrainedConfig) -> None:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(config, name):
            raise UnsupportedError(f"GPT-2 with {name} is not supported", wanted=f"{name}: false")


def _groups(config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
    only_kv_groups(head_units, "GPT-2")
    hidden = config.hidden_size
    head_dim = hidden // config.num_attention_heads
    mlp = UnitGroup(
        kind="mlp",
        num_units=config.n_inner if config.n_inner is not None else 4 * hidden,
        width=1,
        producers=(AxisSlice(tensor="mlp.c_fc.weight", axis=1), AxisSlice(tensor="mlp.c_fc.bias", axis=0)),
        consumer=AxisSlice(tensor="mlp.c_proj.weight", axis=0),
        consumer_module="mlp.c_proj",
        consumer_bias="mlp.c_proj.bias",
        config_fields={"n_inner": 1},
        module_prefix="mlp.",
        up_module="mlp.c_fc",
        activation=config.activation_function,
        norm_modules=_NORMS["mlp"],
    )
    attention = UnitGroup(
        kind="attention",
        num_units=config.num_attention_heads,
        width=head_dim,
        producers=tuple(
            AxisSlice(tensor=f"attn.c_attn.{part}", axis=axis, width=head_dim, offset=third * hidden)
            for third in range(3)
            for part, axis in (("weight", 1), ("bias", 0))
        ),
        consumer=AxisSlice(tensor="attn.c_proj.weight", axis=0, width=head_dim),
        consumer_module="attn.c_proj",
        consumer_bias="attn.c_proj.bias",
        # Stock GPT-2 derives all four maps from the hidden size, so no config entry can express fewer heads.
        config_fields={},
        module_prefix="attn.",
        norm_modules=_NORMS["attention"],
    )
    return (mlp, attention)


GPT2 = Family(
    name="gpt2",
    blocks_module="transformer.h",
    embedding_modules=("transformer.wte", "transformer.wpe"),
    rotary_module=None,
    final_norm_module="transformer.ln_f",
    head_module="lm_head",
    attention_module="attn",
    mlp_modules=("mlp",),
    norms=_NORMS,
    classes={
        "gpt2": StockClasses(module="gpt2", stem="GPT2", layer="GPT2Block", chain=("GPT2Model", "GPT2LMHeadModel"))
    },
    inputs_first=True,
    groups=_groups,
    check=_check,
)
