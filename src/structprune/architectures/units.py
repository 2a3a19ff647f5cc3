"""What the removal of units does to a block's tensors; tensors and layouts only, no module."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from structprune.errors import UnsupportedError
from structprune.types import UNIT_KINDS, AxisSlice, BlockLayout, UnitGroup, UnitKind


def compact(tensors: Mapping[str, Tensor], group: UnitGroup, keep_units: Tensor) -> dict[str, Tensor]:
    """Cut every axis of `group` down to the units in `keep_units` (ascending). Other tensors are passed through.

    Indices of an axis that no unit owns stay (fused tensors hold several groups), and what stays keeps its order.
    """
    result = dict(tensors)
    by_axis: dict[tuple[str, int], list[AxisSlice]] = {}
    for part in group.slices:
        by_axis.setdefault((part.tensor, part.axis), []).append(part)
    for (name, axis), parts in by_axis.items():
        mask = torch.ones(result[name].shape[axis], dtype=torch.bool)
        for part in parts:
            mask[part.indices(torch.arange(group.num_units))] = False
            mask[part.indices(keep_units)] = True
        result[name] = result[name].index_select(axis, torch.nonzero(mask).flatten().to(result[name].device))
    return result


def add_bias(tensors: Mapping[str, Tensor], group: UnitGroup, bias_O: Tensor) -> dict[str, Tensor]:
    """Add `bias_O` to the consumer's bias; where there is none, the sublayer's other maps get zeros too.

    Raises UnsupportedError if the family has no config entry for such biases.
    """
    result = dict(tensors)
    name = group.bias_name
    if group.consumer_bias is None:
        check_bias(group)
        for module in group.bias_modules:
            weight = tensors[f"{module}.weight"]
            result[f"{module}.bias"] = weight.new_zeros(weight.shape[0])
    result[name] = (result[name] + bias_O.to(result[name].dtype)).contiguous()
    return result


def check_bias(group: UnitGroup) -> None:
    """Raise UnsupportedError if the group's consumer has no bias and cannot get one."""
    if group.consumer_bias is None and group.bias_field is None:
        raise UnsupportedError(
            f"the stock class has no bias in its {group.kind}, which this method adds",
            wanted="a family with biases there, such as llama or gpt2",
            do="use another --solver",
        )


def missing_biases(block: BlockLayout, kinds: Collection[UnitKind] = UNIT_KINDS) -> dict[str, tuple[int, ...]]:
    """Name the biases that the block's consumers of these kinds lack and can get, with their shapes.

    The config entry that gives a consumer its bias gives one to the sublayer's other maps too.
    """
    return {
        f"{module}.bias": block.shapes[f"{module}.weight"][:1]
        for group in block.groups
        if group.kind in kinds and group.consumer_bias is None and group.bias_field is not None
        for module in group.bias_modules
    }


def remove_sublayer(tensors: Mapping[str, Tensor], block: BlockLayout, kind: UnitKind) -> dict[str, Tensor]:
    """Remove the tensors of one sublayer and its norm from `tensors` of `block` (relative names)."""
    gone = set(block.sublayer_tensors(kind))
    return {name: tensor for name, tensor in tensors.items() if name not in gone}


def producer_norms(tensors: Mapping[str, Tensor], group: UnitGroup) -> Tensor:
    """Compute each unit's L2 norm of its slice of every producer's weight, shape (producers, units), float32."""
    norms: list[Tensor] = []
    for part in group.producers:
        weight = tensors[part.tensor]
        if weight.ndim < 2:
            continue  # a bias moves with its row but is no weight of its own
        rows = weight.float().movedim(part.axis, 0)[part.indices(torch.arange(group.num_units))]
        norms.append(rows.reshape(group.num_units, -1).norm(dim=1).cpu())
    return torch.stack(norms)
