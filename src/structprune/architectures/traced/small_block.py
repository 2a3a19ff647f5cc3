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

from structprune.architectures.family import Experts, MlpMaps
from structprune.architectures.modeling.narrow_mlp import narrow_mlp
from structprune.architectures.stock.experts import split_experts
from structprune.architectures.stock.placeholders import give_buffers, parameters_on_meta
from structprune.architectures.traced.surroundings import Surroundings, random_tensor
from structprune.architectures.traced.widths import shapes_of
from structprune.types import UnitGroup, UnitKind

TOLERANCE = 1e-4
"""Largest difference as a share of the largest value, in float32."""
_READ = "input of the consumer"
_FEW: Mapping[UnitKind, int] = {"attention": 2, "mlp": 16}


class SmallBlock:
    """Config and weights of the stock block `index` with few units, as far as its config can say so few.

    A mixture has few experts. Weights go by the names that the experts have one by one.
    """

    def __init__(
        self,
        around: Surroundings,
        groups: Sequence[UnitGroup],
        index: int,
        experts: Experts | None,
        channel_maps: MlpMaps | None,
    ) -> None:
        self._around, self.index, self._experts, self._channel_maps = around, index, experts, channel_maps
        self._given = around.given_buffers(index)
        few: dict[UnitKind, int] = {
            group.kind: min(_FEW[group.kind], group.num_units) for group in groups if group.config_fields
        }
        self.config = with_units(own_config(around.config, index), groups, few)
        if experts is not None and experts.count_field:
            self._take_few_experts(experts)
        layer = self._stock(index)
        if experts is not None:
            split_experts(layer, experts)
        self.tensors = _random_tensors(layer)

    def _take_few_experts(self, experts: Experts) -> None:
        """Leave as few experts as stock code takes, of those that tokens are sent to."""
        total = getattr(self.config, experts.count_field)
        chosen = getattr(self.config, experts.chosen_field, None) or 1
        for count in (min(max(4, 2 * chosen), total), total):
            setattr(self.config, experts.count_field, count)
            layer = self._stock(self.index)
            layer.load_state_dict(_random_tensors(layer), strict=True, assign=True)
            try:
                self.run(layer)
            except Exception:
                continue
            return

    def _stock(self, index: int) -> nn.Module:
        """Build the stock layer as stock code does, with its own buffers, parameters on `meta`."""
        layer_class: Any = type(self._around.blocks[index])
        with parameters_on_meta():
            layer: nn.Module = layer_class(self.config, layer_idx=index).eval()
        narrow_mlp(layer, self.config, self._channel_maps)
        give_buffers(layer, self._given, torch.device("cpu"))
        return layer.requires_grad_(False)

    def build(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Build the stock layer with these weights, for number `index`."""
        layer = self._stock(index)
        stacked = tensors if self._experts is None else self._experts.stacking.stack(tensors)
        layer.load_state_dict(dict(stacked), strict=True, assign=True)
        return layer.requires_grad_(False)

    def run(self, block: nn.Module) -> Tensor:
        """Run `block` in its place."""
        with torch.no_grad():
            output = block(self._around.hidden_BSD, **self._around.block_kwargs[self.index])
        return output[0] if isinstance(output, tuple) else output

    def output_scale(self, group: UnitGroup, others: Mapping[str, type[nn.Module]]) -> float | None:
        """Measure what the output of a group's consumer is multiplied by before the stream's sum; None: by no number.

        `others` are the modules of the other sublayer and its norms, with what stands for each.
        """
        outputs: list[Tensor] = []
        found: list[Tensor] = []
        zeros = [group.consumer.tensor, *([group.consumer_bias] if group.consumer_bias is not None else [])]
        for tensors in (self.tensors, self.zeroed(zeros)):
            block = self.build(self.index, tensors)
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
        """Whether some block of the kind, with the same weights and arguments, differs from its first by number alone.

        Blocks that a list in the config tells from the first one are left out: they differ by what the list says.
        """
        count = len(self._around.blocks)
        lists = [each for each in self.config.to_dict().values() if isinstance(each, list) and len(each) == count]
        alike = [
            index
            for index, kind in enumerate(self._around.kind_of)
            if kind == self.index != index and all(each[index] == each[self.index] for each in lists)
        ]
        first_BSD = self.run(self.build(self.index, self.tensors))
        some = {*alike[:2], *alike[-2:]}
        return any(not torch.equal(self.run(self.build(index, self.tensors)), first_BSD) for index in some)

    def has_activation(self, group: UnitGroup, name: str) -> bool:
        """Whether an MLP's last map reads activation(up x), or activation(gate x) up x, with this activation."""
        assert group.up_module is not None
        seen: dict[str, Tensor] = {}
        block = self.build(self.index, self.tensors)
        for module in (group.up_module, *([group.gate_module] if group.gate_module is not None else [])):
            block.get_submodule(module).register_forward_hook(partial(_keep_output, seen, module))
        block.get_submodule(group.consumer_module).register_forward_pre_hook(partial(_keep_input, seen))
        self.run(block)
        activation: Any = ACT2FN[name]
        up = seen[group.up_module]
        with torch.no_grad():
            expected = activation(up) if group.gate_module is None else activation(seen[group.gate_module]) * up
        return relative_difference(seen[_READ], expected) <= TOLERANCE

    def zeroed(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the weights with zeros for these tensors, and for all of the experts where one of theirs is named."""
        zeros = set(names)
        if self._experts is not None and any(name.startswith(f"{self._experts.module}.") for name in names):
            zeros |= {name for name in self.tensors if name.startswith(f"{self._experts.module}.")}
        return {name: torch.zeros_like(each) if name in zeros else each for name, each in self.tensors.items()}


def _random_tensors(layer: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: random_tensor(shape, generator) for name, shape in shapes_of(layer).items()}


def _keep_output(seen: dict[str, Tensor], name: str, _: nn.Module, __: object, output: Tensor) -> None:
    seen[name] = output


def _keep_input(seen: dict[str, Tensor], _: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen[_READ] = args[0]


def own_config(config: PretrainedConfig, index: int) -> PretrainedConfig:
    """Return what a config says of block `index`."""
    return config.per_layer_config[index] if config.is_heterogeneous else config


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
