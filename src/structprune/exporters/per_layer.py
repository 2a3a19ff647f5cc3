"""Uneven widths: the stock config with `per_layer_config`, and a small modelling file that consumes it.

The result loads through `from_pretrained(directory, trust_remote_code=True)`. No class for AutoConfig is needed:
stock configs accept `per_layer_config`, and since 5.23 transformers does not register foreign classes for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structprune.architectures.family import Family
from structprune.architectures.modeling.per_layer import MODELING_MODULE, MODELING_NAME, class_name, modeling_source
from structprune.architectures.modeling.removed import (
    REMOVED_ENTRY,
    check_attention_is_left,
    removed_entry,
    removed_sublayers,
)
from structprune.architectures.modeling.value_channels import has_narrow_values
from structprune.architectures.stock.config import stock_layer_entries
from structprune.architectures.stock.model import StockModel
from structprune.errors import UnsupportedError
from structprune.files import write_text
from structprune.types import UNIT_KINDS


def per_layer_config(config: Mapping[str, Any], stock: StockModel, kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Add the widths of every block to `config`, the JSON of `stock`; `kept` is kind -> kept units of each block.

    The global numbers stay those of the source: an upper bound for readers that know only one width. Widths of
    kinds that are not in `kept` stay as they are, also where the source is per-layer itself. Where nothing of a kind is
    kept, that sublayer is named as removed and its widths stay too: LlamaConfig divides by them.
    Raises UnsupportedError for a kind without a per-layer form, or if no block would have attention.
    """
    classes = stock.family.classes[config["model_type"]]
    if own := stock_layer_entries(config["model_type"]):
        raise UnsupportedError(
            f"stock {stock.family.name} asks its config for the sizes of all blocks of one kind: they keep one width",
            got=f"--structure per-layer, {', '.join(sorted(own))} in per_layer_config",
            wanted="--structure uniform",
        )
    source_layers = {int(index): fields for index, fields in (config.get("per_layer_config") or {}).items()}
    layers = [dict(source_layers.get(index, {})) for index in range(len(stock.layout.blocks))]
    removed = list(removed_sublayers(config, len(layers), "config.json"))
    result = {name: value for name, value in config.items() if name != REMOVED_ENTRY}
    for block in stock.layout.blocks:
        for kind in UNIT_KINDS:
            counts = kept.get(kind)
            if counts is None:
                continue
            count = counts[block.index]
            if not block.has(kind):
                # Removed before, or a block that never had it.
                continue
            if count == 0:
                removed[block.index] = removed[block.index].union((kind,))
                continue
            # Its own: blocks of an uneven source differ in what a unit of theirs is.
            group = block.group(kind)
            if count != group.num_units and not group.config_fields:
                raise UnsupportedError(f"stock {stock.family.name} cannot express fewer {kind} units")
            layers[block.index].update(group.config_values(count))
            result |= group.fixed_changes(result)
    check_attention_is_left(removed)
    if any(removed):
        result[REMOVED_ENTRY] = removed_entry(removed)
    digits = len(str(len(layers) - 1))
    return result | {
        "architectures": [class_name(classes, "ForCausalLM")],
        "auto_map": {
            "AutoModel": f"{MODELING_MODULE}.{class_name(classes, 'Model')}",
            "AutoModelForCausalLM": f"{MODELING_MODULE}.{class_name(classes, 'ForCausalLM')}",
        },
        # Stock LlamaConfig reads the global number of heads when it checks itself, which raises without this.
        "allow_global_per_layer_attribute_access": True,
        "per_layer_config": {str(index).zfill(digits): fields for index, fields in enumerate(layers)},
    }


def write_modeling_file(directory: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Write the family's constant modelling file beside config.json, which is to hold `config`."""
    write_text(directory / MODELING_NAME, modeling_source(family, narrow=has_narrow_values(config)))
