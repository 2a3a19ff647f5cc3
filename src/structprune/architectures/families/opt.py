"""OPT: LayerNorm, biases everywhere, fc1 -> ReLU -> fc2, learned positions with an offset of two.

Channel j of the MLP is fc1 row j, fc1 bias j and fc2 column j.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from structprune.architectures.families.common import only_kv_groups
from structprune.architectures.family import Family, StockClasses
from structprune.errors import UnsupportedError
from structprune.types import AxisSlice, HeadUnits, SublayerKind, UnitGroup

_NORMS: Mapping[SublayerKind, tuple[str, ...]] = {
    "attention": ("self_attn_layer_norm",),
    "mlp": ("final_layer_norm",),
}


def _check(config: PretrainedConfig) -> None:
    if config.word_embed_proj_dim != config.hidden_size:
        raise UnsupportedError(
            "OPT with project_in/project_out is not supported",
            got=f"word_embed_proj_dim {config.word_embed_proj_dim}, hidden_size {config.hidden_size}",
            wanted="equal sizes (every OPT but 350m)",
            do="use another size of OPT",
        )
    if not config.do_layer_norm_before:
        raise UnsupportedError(
            "OPT with layer norm after the sum is not supported", wanted="do_layer_norm_before: true"
        )


def _groups(config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
    only_kv_groups(head_units, "OPT")
    bias = bool(config.enable_bias)
    head_dim = config.hidden_size // config.num_attention_heads
    mlp = UnitGroup(
        kind="mlp",
        num_units=config.ffn_dim,
        width=1,
        producers=(AxisSlice(tensor="fc1.weight", axis=0), *((AxisSlice(tensor="fc1.bias", axis=0),) if bias else ())),
        consumer=AxisSlice(tensor="fc2.weight", axis=1),
        consumer_module="fc2",
        consumer_bias="fc2.bias" if bias else None,
        config_fields={"ffn_dim": 1},
        module_prefix="fc",
        up_module="fc1",
        activation=config.activation_function,
        norm_modules=_NORMS["mlp"],
    )
    attention = UnitGroup(
        kind="attention",
        num_units=config.num_attention_heads,
        width=head_dim,
        producers=tuple(
            AxisSlice(tensor=f"self_attn.{module}.{part}", axis=0, width=head_dim)
            for module in ("q_proj", "k_proj", "v_proj")
            for part in (("weight", "bias") if bias else ("weight",))
        ),
        consumer=AxisSlice(tensor="self_attn.out_proj.weight", axis=1, width=head_dim),
        consumer_module="self_attn.out_proj",
        consumer_bias="self_attn.out_proj.bias" if bias else None,
        # Stock OPT derives q/k/v/out from hidden_size, so no config entry can express fewer heads.
        config_fields={},
        module_prefix="self_attn.",
        norm_modules=_NORMS["attention"],
    )
    return (mlp, attention)


OPT = Family(
    name="opt",
    blocks_module="model.decoder.layers",
    embedding_modules=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    rotary_module=None,
    final_norm_module="model.decoder.final_layer_norm",
    head_module="lm_head",
    attention_module="self_attn",
    mlp_modules=("fc1", "fc2"),
    norms=_NORMS,
    classes={
        "opt": StockClasses(
            module="opt", stem="OPT", layer="OPTDecoderLayer", chain=("OPTDecoder", "OPTModel", "OPTForCausalLM")
        )
    },
    groups=_groups,
    check=_check,
)
