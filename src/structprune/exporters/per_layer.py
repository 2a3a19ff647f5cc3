"""Uneven widths: the stock config with `per_layer_config`, and a small modelling file that consumes it.

The result loads through `from_pretrained(directory, trust_remote_code=True)`. No class for AutoConfig is needed:
stock configs accept `per_layer_config`, and since 5.23 transformers does not register foreign classes for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structprune.architectures.family import Family
from structprune.architectures.per_layer_source import MODELING_MODULE, MODELING_NAME, class_name, modeling_source
from structprune.architectures.removed import REMOVED_ENTRY, check_attention_is_left, removed_entry, removed_halves
from structprune.architectures.stock import StockModel
from structprune.errors import UnsupportedError
from structprune.files import write_text


def per_layer_config(config: Mapping[str, Any], stock: StockModel, kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """`config`, as JSON that of `stock`, with the widths of every block; `kept` is kind -> kept units of each block.

    The global numbers stay those of the source: an upper bound for readers that know only one width. Widths of
    kinds that are not in `kept` stay as they are, also where the source is per-layer itself. Where nothing of a kind is
    kept, that half of the block is named as removed and its widths stay too: LlamaConfig divides by them.
    Raises UnsupportedError for a kind without a per-layer form, or if no block would have attention.
    """
    classes = stock.family.classes[config["model_type"]]
    source_layers = {int(index): fields for index, fields in (config.get("per_layer_config") or {}).items()}
    layers = [dict(source_layers.get(index, {})) for index in range(len(stock.layout.blocks))]
    removed = list(removed_halves(config, len(layers), "config.json"))
    result = {name: value for name, value in config.items() if name != REMOVED_ENTRY}
    for group in stock.groups:
        if group.kind not in kept:
            continue
        for index, count in enumerate(kept[group.kind]):
            assert count == 0 or group.kind not in removed[index], "a removed half keeps no units"
            if count == 0:
                removed[index] = removed[index].union((group.kind,))
        if not group.config_fields:
            if any(count not in (0, group.num_units) for count in kept[group.kind]):
                raise UnsupportedError(f"stock {stock.family.name} cannot express fewer {group.kind} units")
            continue
        for fields, count in zip(layers, kept[group.kind], strict=True):
            if count:
                fields.update({name: count * factor for name, factor in group.config_fields.items()})
        if heads_per_unit := group.config_fields.get("num_attention_heads"):
            # Left out, it would be derived from the number of heads, which now differs between blocks.
            result["head_dim"] = group.width // heads_per_unit
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


def write_modeling_file(directory: Path, family: Family) -> None:
    """Write the family's constant modelling file beside config.json."""
    write_text(directory / MODELING_NAME, modeling_source(family))
