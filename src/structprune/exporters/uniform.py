"""Uniform widths: the source's config with smaller numbers, so stock code loads the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from structprune.architectures.family import Family
from structprune.architectures.modeling.removed import REMOVED_ENTRY
from structprune.errors import UnsupportedError
from structprune.types import UnitGroup


def uniform_config(config: Mapping[str, Any], kept: Iterable[tuple[UnitGroup, int]], family: Family) -> dict[str, Any]:
    """Return the source config with the entries that the kept units change; every other entry stays.

    `kept` has the groups of all blocks in scope, each with the units that stay. Raises UnsupportedError if no stock
    class takes the result, as where a block lacks its attention or its MLP, and for blocks that one config cannot say.
    """
    kept = list(kept)
    without = list(dict.fromkeys(group.kind for group, count in kept if count == 0))
    if without or config.get(REMOVED_ENTRY):
        raise UnsupportedError(
            "the uniform format cannot leave out the attention or the MLP of a block",
            got=f"no {' and no '.join(without)} units" if without else f"{REMOVED_ENTRY} in the source's config.json",
            do="use --structure per-layer",
        )
    result = dict(config)
    said: dict[str, int] = {}
    for group, count in kept:
        values = group.config_values(count)
        if differing := [name for name, value in values.items() if said.get(name, value) != value]:
            name = differing[0]
            raise UnsupportedError(
                "one config cannot say different numbers of units for the blocks that read the same entry",
                got=f"{name} {said[name]} and {values[name]}",
                do="use --structure per-layer",
            )
        said |= values
        result |= values
        if count != group.num_units:
            result |= group.fixed_changes(result)
    return family.resized(result)
