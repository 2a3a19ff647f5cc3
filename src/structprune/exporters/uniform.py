"""Uniform widths: the source's config with smaller numbers, so stock code loads the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from structprune.architectures.family import Family
from structprune.architectures.modeling.removed import REMOVED_ENTRY
from structprune.errors import UnsupportedError
from structprune.types import UnitGroup


def uniform_config(
    config: Mapping[str, Any], groups: tuple[UnitGroup, ...], kept: Mapping[str, int], family: Family
) -> dict[str, Any]:
    """Return the source config with the entries that `kept` units per kind change; every other entry stays.

    Raises UnsupportedError if no stock class takes the result, as where a block lacks its attention or its MLP.
    """
    without = [kind for kind, count in kept.items() if count == 0]
    if without or config.get(REMOVED_ENTRY):
        raise UnsupportedError(
            "the uniform format cannot leave out the attention or the MLP of a block",
            got=f"no {' and no '.join(without)} units" if without else f"{REMOVED_ENTRY} in the source's config.json",
            do="use --structure per-layer",
        )
    result = dict(config)
    for group in groups:
        if group.kind not in kept:
            continue
        result |= group.config_values(kept[group.kind])
        if kept[group.kind] != group.num_units:
            result |= group.fixed_fields
    return family.resized(result)
