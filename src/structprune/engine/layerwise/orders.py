"""Another order of a block's channels, so that groups of N:M lose less: of MLP channels, and of each KV head's values.

Channels that matter are dealt out over the groups of the map that reads them, one to each group in turn, and then
exchanged between groups by assignments (`assigned.py`): both stages of RIA's channel permutation (Plug-and-Play, ICLR
2024). The order is folded into the weights: the maps that compute the channels get their rows in it, the one that reads
them its columns, and the block computes what it did.

Shape suffixes: U units (channels), I inputs of the map that reads them, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from structprune.architectures.stock.model import StockModel
from structprune.engine.layerwise.assigned import assigned
from structprune.errors import UnsupportedError
from structprune.patterns import NM
from structprune.solvers.elements.scores import relative_importance
from structprune.types import BlockLayout, UnitGroup, UnitKind


def movable_groups(stock: StockModel, block: BlockLayout, kinds: Collection[UnitKind]) -> dict[str, UnitGroup]:
    """Find the channels whose order is free: map that reads them -> their group."""
    found = list(block.groups_of("mlp")) if "mlp" in kinds else []
    if "attention" in kinds and block.has("attention"):
        family, config = stock.family.at(block.index), stock.block_configs[block.index]
        # Where the order of a head's values is not free there are no such units.
        with contextlib.suppress(UnsupportedError):
            found += [group for group in family.groups(config, "value-channel") if group.kind == "attention"]
    return {group.consumer_module: group for group in found if group.held is None}


def channel_order(weight_OI: Tensor, energy_I: Tensor, group: UnitGroup, pattern: NM) -> Tensor:
    """Return the order of the units in which runs of `pattern.of` keep most of RIA's score, (U,).

    First every run has one of each part of the ranking by the sum over the map's column. Of the parts every second one
    is dealt backwards, so that a group with a strong channel of one has a weak one of the next. Then channels of one
    place change runs. Units stay within their partition.
    """
    score_IO = relative_importance(weight_OI, energy_I).T.contiguous().cpu()
    inputs_UI = group.consumer.indices(torch.arange(group.num_units)).view(group.num_units, -1)
    score_U = score_IO.sum(dim=1, dtype=torch.float64)[inputs_UI].sum(dim=1)
    length = group.num_units // group.partitions
    orders: list[Tensor] = []
    for start, run_U in enumerate(score_U.split(length)):
        own = slice(start * length, (start + 1) * length)
        order_U = assigned(score_IO[inputs_UI[own]].flatten(1), dealt(run_U, pattern.of), pattern.keep, pattern.of)
        orders.append(order_U + own.start)
    return torch.cat(orders)


def dealt(score_U: Tensor, of: int) -> Tensor:
    """Deal out the places of some scores over groups of `of`; what makes no whole group comes last."""
    ranked = score_U.argsort(descending=True, stable=True)
    whole = len(ranked) // of * of
    parts = ranked[:whole].view(of, -1).clone()
    parts[1::2] = parts[1::2].flip(1)
    return torch.cat([parts.T.flatten(), ranked[whole:]])


def in_order(tensors: Mapping[str, Tensor], group: UnitGroup, order_U: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a group with its units in another order, those of maps and biases that have them."""
    changed: dict[str, Tensor] = {}
    for part in group.slices:
        tensor = changed.get(part.tensor, tensors[part.tensor])
        places = torch.arange(tensor.shape[part.axis])
        places[part.indices(torch.arange(group.num_units))] = part.indices(order_U)
        changed[part.tensor] = tensor.index_select(part.axis, places.to(tensor.device))
    return changed


def input_order(group: UnitGroup, num_inputs: int, order_U: Tensor) -> Tensor:
    """Return the order of the reading map's inputs, (I,)."""
    order_I = torch.arange(num_inputs)
    order_I[group.consumer.indices(torch.arange(group.num_units))] = group.consumer.indices(order_U)
    return order_I
