"""Fewer blocks: the source's config with a smaller count, and everything that lists blocks cut along with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from structprune.architectures.family import Family
from structprune.architectures.modeling.removed import REMOVED_ENTRY
from structprune.architectures.stock.config import BLOCK_LISTS
from structprune.errors import UnsupportedError

# Numbers of blocks from the start that are treated in one way, the rest in another.
_LEADING_BLOCKS = ("max_window_layers",)


def check_numbers_can_change(family: Family) -> None:
    """Raise UnsupportedError where blocks compute something else by their number, which a removal changes."""
    if family.numbered:
        raise UnsupportedError(
            f"blocks of {family.name} compute something else by their number, so none of them can be removed",
            wanted="--scope mlp or attention, with a method that removes units",
        )


def shallower_config(config: Mapping[str, Any], parsed: Any, kept: Sequence[int]) -> dict[str, Any]:
    """Build config.json of the blocks `kept` (ascending) alone; `parsed` is the stock config object made of `config`.

    Raises UnsupportedError for a per-layer config and for an entry that lists blocks in a way not known here.
    """
    if config.get("per_layer_config") or config.get(REMOVED_ENTRY):
        raise UnsupportedError(
            "the source's blocks have configs of their own, and the output of depth removal has one for all",
            got="per_layer_config" if config.get("per_layer_config") else REMOVED_ENTRY,
            wanted="a stock config",
            do="remove blocks first and units afterwards",
        )
    num_blocks: int = parsed.num_hidden_layers
    if len(kept) == num_blocks:
        return dict(config)
    for name, value in config.items():
        if isinstance(value, list) and value and "layer" in name and name not in BLOCK_LISTS:
            raise UnsupportedError(
                f"config entry {name!r} lists layers, and how to cut it is not known",
                got=value,
                wanted=f"none but {', '.join(BLOCK_LISTS)}",
            )
    count = parsed.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    result = dict(config) | {count: len(kept)}
    # Stock configs derive a list that is left out from the block's number, which changes here, so the parsed config's
    # list is written out where its blocks differ.
    for name in BLOCK_LISTS:
        values = getattr(parsed, name, None)
        if isinstance(values, list) and len(values) == num_blocks and (name in config or len(set(values)) > 1):
            result[name] = [values[index] for index in kept]
    for name in _LEADING_BLOCKS:
        if isinstance(config.get(name), int):
            result[name] = sum(index < config[name] for index in kept)
    return result
