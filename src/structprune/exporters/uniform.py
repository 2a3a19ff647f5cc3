"""Uniform widths: the source's config with smaller numbers, so stock code loads the result."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structprune.architectures.family import Family
from structprune.architectures.modeling.removed import REMOVED_ENTRY
from structprune.errors import UnsupportedError
from structprune.files import write_json
from structprune.types import UnitGroup

# What travels beside the weights: tokenizer, chat template, generation defaults, licence.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "generation_config.json",
    "chat_template*",
    "LICENSE*",
)


def uniform_config(
    config: Mapping[str, Any], groups: tuple[UnitGroup, ...], kept: Mapping[str, int], family: Family
) -> dict[str, Any]:
    """The source config with the entries that `kept` units per kind change; every other entry stays.

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


def write_companions(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Write config.json and copy the tokenizer, generation config, chat template and licence."""
    write_json(target / "config.json", config)
    copy_companions(source, target)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer, generation config, chat template and licence."""
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
