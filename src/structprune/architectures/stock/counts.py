"""What a config may ask for before anything is built of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from structprune.architectures.stock.tensor_check import advice_on_missing
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError

# Config entries that say how many modules are built.
_COUNTS = ("num_hidden_layers", "n_layer", "num_experts")
# Entries that widths, positions and shares are divided by or made of.
_SIZES = (
    *("hidden_size", "n_embd", "vocab_size", "intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions"),
    *("word_embed_proj_dim", "num_experts_per_tok", "sliding_window", "query_pre_attn_scalar", "rope_theta"),
)
# More than any index of a tensor.
_LARGEST = 2**63


def _says(config: Mapping[str, Any], name: str, value: Any) -> bool:
    """Say whether a config, or one inside it, has this entry with this value."""
    inner = (each for each in config.values() if isinstance(each, Mapping))
    return config.get(name) == value or any(_says(each, name, value) for each in inner)


def check_counts(reader: CheckpointReader) -> None:
    """Raise CheckpointError for more blocks or experts than there are tensors, and for sizes that are none.

    Building the first would take for ever; the second end in a division by zero somewhere. A size that is left out or
    null is the stock class's own.
    """
    where = str(reader.directory / "config.json")
    for name in _COUNTS:
        count = reader.config.get(name)
        if isinstance(count, int | float) and count > len(reader.shapes):
            if not _says(reader.source_config, name, count):
                raise CheckpointError(
                    f"config.json does not say {name}, which the stock class would make {count:g}: that is more than "
                    "the number of tensors",
                    where=where,
                    got=f"{len(reader.shapes)} tensors",
                    do=f"write {name} into it; of a model with images, sound or several parts the sizes are those of "
                    "the text model, in an entry text_config",
                )
            raise CheckpointError(
                f"{name} is larger than the number of tensors",
                where=where,
                got=f"{count:g}" if isinstance(count, float) else f"{str(count)[:20]}",
                wanted=f"at most {len(reader.shapes)}",
                do=advice_on_missing(reader),
            )
    for name in _SIZES:
        size = reader.config.get(name)
        # What is not used may be written as zero, as stock Qwen 2 MoE does with its window.
        unused = size == 0 and reader.config.get(f"use_{name}") is False
        if isinstance(size, int | float) and not unused and not 0 < size < _LARGEST:
            raise CheckpointError(
                f"{name} is no size",
                where=where,
                got=str(size)[:30],
                wanted="a number above zero",
                do="check that config.json belongs to the checkpoint",
            )
