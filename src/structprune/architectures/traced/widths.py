"""Config entries that decide how many units a block has, found by experiment: a block is built with other numbers.

An entry is the one of a group if the block that it gives differs in the tensors of the group alone, by as much as the
group's slices say, and its graph has as many units: twice the heads have the shapes of heads of twice the size. Nothing
has storage.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from structprune.errors import StructPruneError
from structprune.types import UnitGroup

Shapes = Mapping[str, tuple[int, ...]]
BuildBlock = Callable[[PretrainedConfig], nn.Module]
"""Builds the first block of a config on `meta`."""
CountUnits = Callable[[PretrainedConfig], int]
"""Counts the units of a group in the graph of the first block of a config. Raises StructPruneError without any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthEntries:
    """Config entries of a group's width."""

    per_unit: Mapping[str, int]
    """Entry -> its value per unit; empty where no entries give the block fewer units."""
    fixed: Mapping[str, int]
    """Entries that have to be there once those are changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BiasEntry:
    """Config entry that gives the maps of a group a bias."""

    name: str
    modules: tuple[str, ...]


def shapes_of(block: nn.Module) -> Shapes:
    """Return the shape of each parameter and buffer that a checkpoint has of a block."""
    return {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}


def width_entries(
    config: PretrainedConfig, build: BuildBlock, count: CountUnits, groups: Sequence[UnitGroup]
) -> WidthEntries:
    """Find the entries of the first of `groups`, with which all of them change; one or two, two of heads that share.

    What a group of attention needs beside them is the size of a head. `count` reads the graph of the block of a config.
    """
    before, group = shapes_of(build(config)), groups[0]
    entries = dict(_relevant(config, build, before, group.num_units))
    fixed: list[Mapping[str, int]] = [{}]
    for how_many in (1, 2):
        for names in itertools.combinations(entries, how_many):
            per_unit = {name: entries[name] // group.num_units for name in names}
            if group.kind == "attention":
                # Where the size of a head is an entry it is said, else stock code would derive it from the others.
                shared = max(per_unit.values()) // min(per_unit.values())
                fixed = [{"head_dim": group.consumer.width // shared}, {}]
            for beside in fixed:
                if _gives(config, build, groups, per_unit, beside, before) and _has_units(
                    config, count, group.num_units * 2, per_unit, beside
                ):
                    return WidthEntries(per_unit=per_unit, fixed=beside)
    return WidthEntries(per_unit={}, fixed={})


def _relevant(config: PretrainedConfig, build: BuildBlock, before: Shapes, num_units: int) -> Iterable[tuple[str, int]]:
    """Yield the entries, with their values, that are a multiple of the units and without which no block is the same."""
    for name, value in config.to_dict().items():
        if type(value) is int and value > 0 and value % num_units == 0:
            if _built(config, build, {name: 2 * value}) != before:
                yield name, value
        elif value is None:
            # Left out, an entry may follow from others, as the width of an MLP does from the hidden size.
            one, two = _built(config, build, {name: num_units}), _built(config, build, {name: 2 * num_units})
            if one == before and two not in (None, before):
                yield name, num_units


def _gives(
    config: PretrainedConfig,
    build: BuildBlock,
    groups: Sequence[UnitGroup],
    per_unit: Mapping[str, int],
    fixed: Mapping[str, int],
    before: Shapes,
) -> bool:
    """Whether these entries give the block other numbers of units, and change nothing else."""
    count = groups[0].num_units
    for num_units in {2 * count, max(1, count // 2), count}:
        expected = before
        for group in groups:
            expected = resized_shapes(expected, group, num_units)
        if _built(config, build, _values(num_units, per_unit, fixed)) != expected:
            return False
    return True


def _has_units(
    config: PretrainedConfig, count: CountUnits, num_units: int, per_unit: Mapping[str, int], fixed: Mapping[str, int]
) -> bool:
    try:
        return count(changed(config, _values(num_units, per_unit, fixed))) == num_units
    except StructPruneError:
        return False


def _values(num_units: int, per_unit: Mapping[str, int], fixed: Mapping[str, int]) -> dict[str, int]:
    return {**fixed, **{name: factor * num_units for name, factor in per_unit.items()}}


def changed(config: PretrainedConfig, values: Mapping[str, object]) -> PretrainedConfig:
    """Return a config with other entries."""
    result = copy.deepcopy(config)
    for name, value in values.items():
        setattr(result, name, value)
    return result


def _built(config: PretrainedConfig, build: BuildBlock, values: Mapping[str, object]) -> Shapes | None:
    """Return the shapes of the block with these entries; None where stock code does not build it."""
    try:
        with warnings.catch_warnings():
            # Numbers that do not go together may leave tensors empty.
            warnings.simplefilter("ignore")
            return shapes_of(build(changed(config, values)))
    except Exception:
        # An entry that means something else may break the constructor in any way.
        return None


def resized_shapes(before: Shapes, group: UnitGroup, num_units: int) -> Shapes:
    """Return the shapes of a block whose `group` has another number of units."""
    shapes = {name: list(shape) for name, shape in before.items()}
    for part in group.slices:
        shapes[part.tensor][part.axis] += (num_units - group.num_units) * part.width * part.repeat
    return {name: tuple(shape) for name, shape in shapes.items()}


def bias_entry(config: PretrainedConfig, build: BuildBlock, group: UnitGroup) -> BiasEntry | None:
    """Find the entry that gives a group's consumer a bias, and no map outside its sublayer; None without one."""
    if group.consumer_bias is not None:
        return None
    before = shapes_of(build(config))
    for name, value in config.to_dict().items():
        if value is not False:
            continue
        after = _built(config, build, {name: True})
        if after is None or {key: after.get(key) for key in before} != before:
            continue
        added = [key for key in after if key not in before]
        if group.bias_name in added and all(
            key.endswith(".bias") and key.startswith(group.module_prefix) for key in added
        ):
            return BiasEntry(name=name, modules=tuple(key.removesuffix(".bias") for key in added))
    return None
