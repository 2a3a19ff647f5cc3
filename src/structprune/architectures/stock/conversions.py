"""How stock code names and stacks the tensors of a checkpoint as it loads it: transformers' own table, read here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming


def translates_names(model_type: str) -> bool:
    """Whether stock code loads the checkpoint's names of this type by a translation."""
    return get_checkpoint_conversion_mapping(model_type) is not None


def renamed_tensors(model_type: str, names: Iterable[str]) -> dict[str, str]:
    """Return stored name -> stock name for those that stock code gives another one, and does not stack."""
    steps = [each for each in _conversions(model_type) if isinstance(each, WeightRenaming)]
    found: dict[str, str] = {}
    # In order: some renamings wait for a name that others go by.
    for name in sorted(names) if steps else ():
        wanted = name
        for step in steps:
            wanted = step.rename_source_key(wanted)[0]
        if wanted != name:
            found[name] = wanted
    return found


def maps_in_files(model_type: str, stacked: str) -> tuple[str, ...]:
    """Return the maps of one expert that files have where stock code holds the tensor `stacked`; empty: files have it.

    They come in the order in which their rows are stacked.
    """
    for step in _conversions(model_type):
        if isinstance(step, WeightConverter) and step.target_patterns[0].rpartition(".")[2] == stacked:
            return tuple(pattern.rpartition("*.")[2].removesuffix(".weight") for pattern in step.source_patterns)
    return ()


def _conversions(model_type: str) -> list[Any]:
    return get_checkpoint_conversion_mapping(model_type) or []
