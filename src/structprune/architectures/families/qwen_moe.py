"""Qwen 3 with a mixture of experts: a router sends each token to some of many small gated MLPs.

A unit is a channel of one expert; every expert of a block keeps as many, its own choice. What a sublayer adds is the
sum of its experts' outputs times the router's weights. transformers stacks the experts' weights in memory; checkpoints
have one tensor for each map of each expert, and so have the blocks here.
"""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from structprune.architectures.families.llama import NORMS, VALUE_MAPS, LlamaLike
from structprune.architectures.families.qwen import qwen3_attention
from structprune.architectures.family import Experts, StockClasses
from structprune.architectures.stock.experts import split_experts
from structprune.errors import UnsupportedError
from structprune.types import AxisSlice, HeadUnits, UnitGroup

_EXPERTS = Experts(
    module="mlp.experts",
    routers=("mlp.gate.weight",),
    writer="down_proj",
    stacked={"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)},
    count_field="num_experts",
    chosen_field="num_experts_per_tok",
)


def _unstack(layer: nn.Module, _: PretrainedConfig) -> None:
    split_experts(layer, _EXPERTS)


def _check(config: PretrainedConfig) -> None:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise UnsupportedError(
            "a mixture with blocks that have no experts is not supported",
            got=f"mlp_only_layers {config.mlp_only_layers}, decoder_sparse_step {config.decoder_sparse_step}",
            wanted="experts in every block",
        )


def _groups(config: PretrainedConfig, head_units: HeadUnits) -> tuple[UnitGroup, ...]:
    experts = tuple(
        UnitGroup(
            kind="mlp",
            expert=number,
            num_units=config.moe_intermediate_size,
            width=1,
            producers=tuple(
                AxisSlice(tensor=f"mlp.experts.{number}.{module}.weight", axis=0) for module in ("gate_proj", "up_proj")
            ),
            consumer=AxisSlice(tensor=f"mlp.experts.{number}.down_proj.weight", axis=1),
            consumer_module=f"mlp.experts.{number}.down_proj",
            # The grouped product, which stock code chooses by default, wants rows of whole 16 bytes.
            multiple_of=8,
            output_module="mlp",
            config_fields={"moe_intermediate_size": 1},
            module_prefix="mlp.",
            activation=config.hidden_act,
            norm_modules=NORMS["mlp"],
        )
        for number in range(config.num_experts)
    )
    return (*experts, qwen3_attention(config, head_units))


QWEN3_MOE = LlamaLike(
    name="qwen3_moe",
    classes={
        "qwen3_moe": StockClasses(
            module="qwen3_moe",
            stem="Qwen3Moe",
            layer="Qwen3MoeDecoderLayer",
            chain=("Qwen3MoeModel", "Qwen3MoeForCausalLM"),
        )
    },
    groups=_groups,
    value_maps=VALUE_MAPS,
    unstack=_unstack,
    experts=_EXPERTS,
    registers_names=True,
    check=_check,
)
