"""Attention whose heads have fewer value channels than key channels: V/O pairs that are gone.

Channel j of KV head k is one row of v_proj and, for each query head of its group, one column of o_proj. No stock config
can express fewer of them, so the stock attention runs as it is: v_proj's output is padded with zeros to the size of a
head and o_proj reads the channels that are left. Caches and attention kernels see whole heads. In a checkpoint it is
the entry `v_head_dim` of a block in `per_layer_config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from structprune.architectures.families.common import VALUES_ENTRY, head_size, value_size
from structprune.architectures.family import Family
from structprune.errors import CheckpointError


class _Values(nn.Linear):
    """v_proj with `kept` channels per KV head, and zeros behind them up to the size of a head."""

    def __init__(self, dense: Any, kept: int, size: int) -> None:
        super().__init__(dense.in_features, dense.out_features // size * kept, bias=dense.bias is not None)
        self.kept, self.size = kept, size

    def forward(self, input: Tensor) -> Tensor:
        values = super().forward(input).unflatten(-1, (-1, self.kept))
        return nn.functional.pad(values, (0, self.size - self.kept)).flatten(-2)


class NarrowOutputs(nn.Linear):
    """o_proj of heads of which the first `kept` channels are read."""

    def __init__(self, dense: Any, kept: int, size: int) -> None:
        super().__init__(dense.in_features // size * kept, dense.out_features, bias=dense.bias is not None)
        self.kept, self.size = kept, size

    def forward(self, input: Tensor) -> Tensor:
        heads = input.unflatten(-1, (-1, self.size))
        return super().forward(heads[..., : self.kept].flatten(-2))

    def spread(self, values: Tensor) -> Tensor:
        """Spread one value for each channel that is read to the width of the input, ones for the others."""
        heads = values.unflatten(-1, (-1, self.kept))
        return nn.functional.pad(heads, (0, self.size - self.kept), value=1.0).flatten(-2)


def narrow_values(layer: nn.Module, config: PretrainedConfig, family: Family) -> None:
    """Exchange v_proj and o_proj of a stock layer on `meta` where the block's config says fewer value channels."""
    kept, size = value_size(config), head_size(config)
    if family.value_maps is None or kept == size:
        return
    with torch.device("meta"):
        for name, narrow in zip(family.value_maps, (_Values, NarrowOutputs), strict=True):
            layer.set_submodule(name, narrow(layer.get_submodule(name), kept, size))


def has_narrow_values(config: Mapping[str, Any]) -> bool:
    """Whether config.json, read as JSON, is that of a checkpoint with blocks of fewer value channels."""
    return any(VALUES_ENTRY in fields for fields in (config.get("per_layer_config") or {}).values())


def check_values(config: PretrainedConfig, blocks: Sequence[PretrainedConfig], where: str) -> None:
    """Raise CheckpointError for a `v_head_dim` that is no width of a head; the global one must be that of all keys."""
    size = head_size(config)
    for place, found in [("", config), *((f", block {index}", block) for index, block in enumerate(blocks))]:
        value = getattr(found, VALUES_ENTRY, None)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= size or (not place and value != size):
            raise CheckpointError(
                f"{VALUES_ENTRY} is not usable",
                where=where + place,
                got=repr(value),
                wanted=f"1 to {size}" if place else f"{size}, the size of a head; smaller ones are in per_layer_config",
            )
