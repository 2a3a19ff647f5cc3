"""Gates in front of a consumer: each unit's share of its input is multiplied by one number.

What stands in for a unit that is gone is optional: its prediction from the units that stay in any case. The consumer
then computes what it would if it were solved again for those units, without being solved: a gate z of a unit with the
input x and the stand-in x' gives z x + (1 - z) x'. The derivative by the gate is the sum over tokens of (x - x') (g W)
for a gradient g at the consumer's output W x; autograd takes it.

Shape suffixes: B windows, S positions, I consumer inputs, U units, C inputs that always stay, R all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structprune.types import UnitGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIns:
    """Linear prediction of the inputs that may go from those that always stay."""

    core_C: Tensor
    """Numbers of the inputs that always stay."""
    rest_R: Tensor
    """Numbers of the others."""
    weight_CR: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> StandIns:
        """Return the same on `device`, the weight in `dtype`."""
        return StandIns(
            core_C=self.core_C.to(device),
            rest_R=self.rest_R.to(device),
            weight_CR=self.weight_CR.to(device, dtype),
        )


def unit_of_input(group: UnitGroup) -> Tensor:
    """Return which unit each of the consumer's inputs belongs to, (I,)."""
    units_U = torch.arange(group.num_units)
    unit_I = torch.empty(group.num_units * group.width, dtype=torch.int64)
    unit_I[group.consumer.indices(units_U)] = units_U.repeat_interleave(group.width)
    return unit_I


def gated_inputs(x_BSI: Tensor, gate_I: Tensor, stand_ins: StandIns | None) -> Tensor:
    """Multiply each input by its gate, and let what stands in for it have the rest."""
    gated_BSI = (x_BSI * gate_I).to(x_BSI.dtype)
    if stand_ins is None:
        return gated_BSI
    predicted_BSR = x_BSI[..., stand_ins.core_C] @ stand_ins.weight_CR
    missing_BSR = (predicted_BSR * (1 - gate_I[stand_ins.rest_R])).to(x_BSI.dtype)
    return gated_BSI.index_add(-1, stand_ins.rest_R, missing_BSR)


def add_gate(block: nn.Module, group: UnitGroup, name: str, gate_U: Tensor, stand_ins: StandIns | None) -> None:
    """Give the group's consumer the gates (units,) as a parameter `name`, in front of whatever it reads."""
    consumer = block.get_submodule(group.consumer_module)
    consumer.register_parameter(name, nn.Parameter(gate_U))
    unit_I = unit_of_input(group).to(gate_U.device)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_BSI, *others = args
        return gated_inputs(x_BSI, module.get_parameter(name)[unit_I], stand_ins), *others

    consumer.register_forward_pre_hook(hook)
