"""A block that can be run anywhere: the true hidden size, few units, random weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from structprune.architectures.stock.placeholders import parameters_on_meta
from structprune.architectures.traced.surroundings import Surroundings, random_tensor
from structprune.architectures.traced.widths import shapes_of
from structprune.types import UnitGroup, UnitKind

TOLERANCE = 1e-4
"""Largest difference as a share of the largest value, in float32."""
_READ = "input of the consumer"
_FEW: Mapping[UnitKind, int] = {"attention": 2, "mlp": 16}


class SmallBlock:
    """Config and weights of a stock block with few units, as far as its config can say so few."""

    def __init__(self, around: Surroundings, groups: Sequence[UnitGroup]) -> None:
        self._around = around
        few: dict[UnitKind, int] = {
            group.kind: min(_FEW[group.kind], group.num_units) for group in groups if group.config_fields
        }
        self.config = with_units(around.config, groups, few)
        generator = torch.Generator().manual_seed(1)
        shapes = shapes_of(self.build(0, None))
        self.tensors = {name: random_tensor(shape, generator) for name, shape in shapes.items()}

    def build(self, index: int, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Build the stock layer as stock code does, with its own buffers; parameters on `meta` without `tensors`."""
        layer_class: Any = type(self._around.blocks[index])
        with parameters_on_meta():
            layer: nn.Module = layer_class(self.config, layer_idx=index).eval()
        if tensors is not None:
            layer.load_state_dict(dict(tensors), strict=True, assign=True)
        return layer.requires_grad_(False)

    def run(self, block: nn.Module) -> Tensor:
        """Run `block` in the place of the first one."""
        with torch.no_grad():
            output = block(self._around.hidden_BSD, **self._around.block_kwargs[0])
        return output[0] if isinstance(output, tuple) else output

    def output_scale(self, group: UnitGroup, others: Mapping[str, type[nn.Module]]) -> float | None:
        """Measure what the output of a group's consumer is multiplied by before the stream's sum; None: by no number.

        `others` are the modules of the other sublayer and its norms, with what stands for each.
        """
        outputs: list[Tensor] = []
        found: list[Tensor] = []
        for tensors in (self.tensors, self.zeroed(group)):
            block = self.build(0, tensors)
            for name, stand_in in others.items():
                block.set_submodule(name, stand_in())
            block.get_submodule(group.consumer_module).register_forward_hook(lambda *args: outputs.append(args[2]))
            found.append(self.run(block))
        added, given = (found[0] - found[1]).double().flatten(), outputs[0].double().flatten()
        scale = float(added @ given / (given @ given))
        if not float((added - scale * given).abs().max()) <= TOLERANCE * float(added.abs().max()):
            return None
        # What was measured is rounded; what the config says is not.
        said = [value for value in self.config.to_dict().values() if isinstance(value, float)]
        return next((value for value in (1.0, *said) if abs(value - scale) <= TOLERANCE * abs(scale)), scale)

    def is_numbered(self) -> bool:
        """Whether some block, with the same weights and arguments, differs from the first one by its number alone.

        Blocks that a list in the config tells from the first one are left out: they differ by what the list says.
        """
        count = len(self._around.blocks)
        lists = [each for each in self.config.to_dict().values() if isinstance(each, list) and len(each) == count]
        alike = [index for index in range(1, count) if all(each[index] == each[0] for each in lists)]
        first_BSD = self.run(self.build(0, self.tensors))
        some = {*alike[:2], *alike[-2:]}
        return any(not torch.equal(self.run(self.build(index, self.tensors)), first_BSD) for index in some)

    def has_activation(self, group: UnitGroup, name: str) -> bool:
        """Whether an MLP's last map reads activation(up x), or activation(gate x) up x, with this activation."""
        assert group.up_module is not None
        seen: dict[str, Tensor] = {}
        block = self.build(0, self.tensors)
        for module in (group.up_module, *([group.gate_module] if group.gate_module is not None else [])):
            block.get_submodule(module).register_forward_hook(partial(_keep_output, seen, module))
        block.get_submodule(group.consumer_module).register_forward_pre_hook(partial(_keep_input, seen))
        self.run(block)
        activation: Any = ACT2FN[name]
        up = seen[group.up_module]
        with torch.no_grad():
            expected = activation(up) if group.gate_module is None else activation(seen[group.gate_module]) * up
        return relative_difference(seen[_READ], expected) <= TOLERANCE

    def zeroed(self, group: UnitGroup) -> dict[str, Tensor]:
        """Return the weights with zeros where the group's consumer adds to the stream."""
        names = (group.consumer.tensor, *([group.consumer_bias] if group.consumer_bias is not None else []))
        return {**self.tensors, **{name: torch.zeros_like(self.tensors[name]) for name in names}}


def _keep_output(seen: dict[str, Tensor], name: str, _: nn.Module, __: object, output: Tensor) -> None:
    seen[name] = output


def _keep_input(seen: dict[str, Tensor], _: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen[_READ] = args[0]


def with_units(config: PretrainedConfig, groups: Sequence[UnitGroup], kept: Mapping[UnitKind, int]) -> PretrainedConfig:
    """Return the config with so many units of each kind."""
    result = copy.deepcopy(config)
    for group in groups:
        if group.kind in kept:
            for name, value in group.config_changes(kept[group.kind]).items():
                setattr(result, name, value)
    return result


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
