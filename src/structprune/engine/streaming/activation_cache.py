"""Inputs of a sublayer's consumer, kept from the pass that sums them up until the consumer is solved.

What the sublayer gives afterwards is the solved weight times the inputs that stay: producers only lose rows, so the
others' activations are what they were, and attention or gate and up are not computed again. Only for a sublayer that
stands alone in its stage, has one part, adds its consumer's output without a norm, and keeps its producers. Where
single weights go the producers are pruned by then, and the consumer is the last map of its sublayer.

Shape suffixes: N windows, T tokens, S positions, D hidden size, B windows of a micro-batch, I consumer inputs,
K kept ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.architectures.stock.maps import MapStep
from structprune.architectures.stock.model import StockModel
from structprune.solvers import SOLVERS
from structprune.types import UNIT_KINDS, UnitGroup, UnitKind


def cacheable(stock: StockModel, kinds: Collection[UnitKind], solver: str) -> tuple[UnitKind, ...]:
    """List the sublayers in `kinds` that can be finished from the inputs of their consumers."""

    def moves_producers(kind: UnitKind) -> bool:
        return kind == "mlp" and "producers" in SOLVERS.get(solver).changes

    found: list[UnitKind] = [kind for kind in UNIT_KINDS if kind in kinds and not moves_producers(kind)]
    return tuple(kind for kind in found if _finished_by_consumer(stock, kind))


def cacheable_maps(
    stock: StockModel, kinds: Collection[UnitKind], steps: Sequence[Sequence[MapStep]]
) -> tuple[UnitKind, ...]:
    """List the sublayers in `kinds` that are finished from what their last map reads; `steps` of each block."""

    def last_alone(kind: UnitKind) -> bool:
        having = [block for block in stock.layout.blocks if block.has(kind)]
        last = [[step for step in steps[block.index] if step.kind == kind][-1] for block in having]
        wanted = [(block.group(kind).consumer_module,) for block in having]
        return [step.groups[0].maps for step in last] == wanted

    found: list[UnitKind] = [kind for kind in UNIT_KINDS if kind in kinds and _finished_by_consumer(stock, kind)]
    return tuple(kind for kind in found if last_alone(kind))


def _finished_by_consumer(stock: StockModel, kind: UnitKind) -> bool:
    """Whether what the sublayer adds to the stream, in every block that has it, is the output of one matrix."""
    having = [block for block in stock.layout.blocks if block.has(kind)]
    groups = [group for block in having for group in block.groups_of(kind)]
    alone = all(len(stock.stage_of(block.index, kind)) == 1 for block in having)
    return alone and not any(group.output_normed or group.expert is not None for group in groups)


class ActivationCache:
    """One sublayer's inputs of all windows, in one piece of memory that every sublayer of every block uses in turn."""

    def __init__(self, num_windows: int, seq_len: int, most_inputs: int, dtype: torch.dtype) -> None:
        self._shape = (num_windows, seq_len)
        self._flat = torch.empty(num_windows * seq_len * most_inputs, dtype=dtype)

    def inputs(self, group: UnitGroup) -> Tensor:
        """Return the consumer's inputs, (N, S, I), with whatever was written last."""
        num_inputs = group.num_units * group.width
        count = self._shape[0] * self._shape[1] * num_inputs
        return self._flat[:count].view(*self._shape, num_inputs)


def put_inputs(inputs_NSI: Tensor, start: int, x_TI: Tensor) -> None:
    """Write the tokens of whole windows, `start` the first of them."""
    windows_BSI = x_TI.view(-1, *inputs_NSI.shape[1:])
    inputs_NSI[start : start + len(windows_BSI)] = windows_BSI


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedConsumer:
    """A cut consumer that reads what the dense one read."""

    weight_DK: Tensor
    bias_D: Tensor | None
    columns_K: Tensor | None
    """None: all of them."""
    scale: float = 1.0
    """What the output is multiplied by before it is added."""

    @classmethod
    def of(
        cls, group: UnitGroup, tensors: Mapping[str, Tensor], units: Sequence[int], dtype: torch.dtype
    ) -> SolvedConsumer:
        """Build the consumer from the block's tensors with the group cut, and the units that it has kept."""
        consumer = group.consumer
        bias_D = tensors.get(group.bias_name)
        columns_K = None
        if len(units) < group.num_units:
            columns_K = consumer.indices(torch.tensor(units)).sort().values
        return cls(
            weight_DK=tensors[consumer.tensor].movedim(consumer.axis, -1).to(dtype).contiguous(),
            bias_D=None if bias_D is None else bias_D.to(dtype),
            columns_K=columns_K,
            scale=group.output_scale,
        )

    def added(self, stream_BSD: Tensor, x_BSI: Tensor) -> Tensor:
        """Add the consumer's output to the stream, rounded as a block does it."""
        x_BSK = x_BSI if self.columns_K is None else x_BSI[..., self.columns_K]
        output_BSD = torch.nn.functional.linear(x_BSK, self.weight_DK, self.bias_D)
        return stream_BSD + (output_BSD if self.scale == 1.0 else output_BSD * self.scale)
