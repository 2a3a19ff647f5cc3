"""What a mixture's experts are called, found by experiment: a block is built with another number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PretrainedConfig

from structprune.architectures.family import Experts
from structprune.architectures.stock.conversions import maps_in_files
from structprune.architectures.stock.experts import StackedExperts, find_stacked, split_experts, stacked_maps
from structprune.architectures.traced.widths import changed, shapes_of
from structprune.types import AxisSlice, UnitGroup

_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Config entries of how many experts a token is sent to."""
_ROWS = 8
"""The grouped product, which stock code chooses by default, wants rows of whole 16 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """The experts of a block, by the names that they have in files."""

    experts: Experts
    num_experts: int

    def split(self, block: nn.Module, *, traced: bool) -> nn.Module:
        """Give the block's experts modules of their own; with `traced` the first one only."""
        split_experts(block, self.experts, traced=traced)
        return block

    def of_all(self, group: UnitGroup, shared: Sequence[UnitGroup], output_module: str | None) -> list[UnitGroup]:
        """Return the group of each expert from that of the first one, and then the `shared` ones, of as many units."""
        groups = [self._of(group, number) for number in range(self.num_experts)]
        groups += [replace(each, expert=self.num_experts + number) for number, each in enumerate(shared)]
        return [
            replace(each, output_module=output_module, multiple_of=_ROWS, up_module=None, gate_module=None)
            for each in groups
        ]

    def is_expert(self, group: UnitGroup) -> bool:
        """Whether the group is that of an expert that tokens are sent to."""
        return group.consumer_module.startswith(f"{self.experts.module}.")

    def _of(self, group: UnitGroup, number: int) -> UnitGroup:
        def named(name: str) -> str:
            prefix = f"{self.experts.module}."
            return f"{prefix}{number}{name.removeprefix(f'{prefix}0')}" if name.startswith(prefix) else name

        def moved(part: AxisSlice) -> AxisSlice:
            return replace(part, tensor=named(part.tensor))

        return replace(
            group,
            expert=number,
            producers=tuple(map(moved, group.producers)),
            consumer=moved(group.consumer),
            consumer_module=named(group.consumer_module),
        )


def joined_units(group: UnitGroup, num_units: int) -> UnitGroup:
    """Join neighbouring units until there are `num_units` of them; the same group where that cannot be.

    An expert for all tokens may be several times as wide as the others by one config entry. Then it loses several
    channels for each one of theirs.
    """
    factor, rest = divmod(group.num_units, num_units)
    if rest or factor < 2 or any(part.repeat > 1 or part.run for part in group.slices):
        return group

    def wider(part: AxisSlice) -> AxisSlice:
        return replace(part, width=part.width * factor)

    return replace(
        group,
        num_units=num_units,
        width=group.width * factor,
        producers=tuple(map(wider, group.producers)),
        consumer=wider(group.consumer),
    )


def find_mixture(config: PretrainedConfig, build: Callable[[PretrainedConfig], nn.Module]) -> Mixture | None:
    """Find the experts of the block that `build` makes of a config, on `meta`; None where it has none.

    Without a config entry for their number they stay as many.
    """
    block = build(config)
    layout = find_stacked(block)
    if layout is None:
        return None
    total = _count(block, layout)
    first = maps_in_files(config.model_type, layout.first)
    last = maps_in_files(config.model_type, "down_proj")
    apart = bool(first and last)
    counted, routers = _counted(config, build, layout, total)
    return Mixture(
        experts=Experts(
            module=layout.module,
            routers=routers,
            writer=last[0] if apart else "down_proj",
            count_field=counted,
            chosen_field=next((name for name in _CHOSEN if getattr(config, name, None) is not None), ""),
            stacked=stacked_maps(layout, *((first, last[0]) if apart else ((layout.first,), "down_proj"))),
            transposed=layout.transposed,
            written_stacked=not apart,
        ),
        num_experts=total,
    )


def _count(block: nn.Module, layout: StackedExperts) -> int:
    return block.get_parameter(f"{layout.module}.{layout.first}").shape[0]


def _counted(
    config: PretrainedConfig, build: Callable[[PretrainedConfig], nn.Module], layout: StackedExperts, total: int
) -> tuple[str, tuple[str, ...]]:
    """Find the entry of the number of experts, and the tensors around them that have a row for each."""
    before = shapes_of(build(config))
    for name, value in config.to_dict().items():
        if type(value) is not int or value != total:
            continue
        try:
            block = build(changed(config, {name: total + 1}))
        except Exception:
            # An entry that means something else may break the constructor in any way.
            continue
        if _count(block, layout) != total + 1:
            continue
        after = shapes_of(block)
        longer = [
            each
            for each, shape in before.items()
            if shape[:1] == (total,) and after.get(each) == (total + 1, *shape[1:])
        ]
        return name, tuple(each for each in longer if not each.startswith(f"{layout.module}."))
    return "", ()
