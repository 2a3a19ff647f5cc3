"""The config of a GGUF file: sizes, what the description's entries say, and what the architecture takes for granted.

What is not taken of the file ends the run (fields.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from structprune.architectures.gguf.description import GgufFamily, GgufReading, Sizes, Target
from structprune.architectures.gguf.fields import GgufFields
from structprune.architectures.gguf.table import GGUF_FAMILIES, READ_AS
from structprune.architectures.stock.config import with_infinities
from structprune.errors import CheckpointError, UnsupportedError

ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")
"""Names that configs have for their activation."""
# Size -> its usual name in a config.
_NAMES = {
    "hidden": "hidden_size",
    "channels": "intermediate_size",
    "blocks": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "positions": "max_position_embeddings",
    "experts": "num_experts",
}


def read_config(fields: GgufFields) -> tuple[dict[str, Any], GgufReading]:
    """Read the config without its vocabulary, dtype and biases, and how the file is read.

    Raises UnsupportedError for an architecture that is in no table.
    """
    if fields.architecture not in READ_AS:
        raise UnsupportedError(
            "this GGUF architecture cannot be read",
            where=fields.where,
            got=fields.architecture,
            wanted="an architecture of the table in docs/gguf.md",
            do="start from the model's Hugging Face checkpoint",
        )
    model_type, reading = _chosen(fields)
    for key in reading.target.unused:
        fields.skip(key)
    config = {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
        "model_type": model_type,
        **_sizes_in_config(model_type, reading),
        **reading.family.requires,
    }
    if reading.family.activations:
        names = _field_names(model_type)
        config[next(name for name in ACTIVATIONS if name in names)] = reading.family.activations[0]
    for entry in reading.target.entries:
        config |= entry.read(reading)
    return config, reading


def _chosen(fields: GgufFields) -> tuple[str, GgufReading]:
    """Find the type that the file is read as."""
    types = READ_AS[fields.architecture]
    sizes = read_sizes(fields, GGUF_FAMILIES[types[0]].uniform)
    for model_type in types:
        reading = GgufReading(fields=fields, sizes=sizes, family=GGUF_FAMILIES[model_type])
        if reading.family.read_if(reading):
            if sizes.experts and not is_mixture(reading.target):
                break
            return model_type, reading
    raise UnsupportedError(
        "the GGUF file is of a variant of its architecture that cannot be read",
        where=fields.where,
        got=f"architecture {fields.architecture} with {sizes.experts or 'no'} experts",
        wanted=" or ".join(types),
        do="start from the model's Hugging Face checkpoint",
    )


def is_mixture(target: Target) -> bool:
    """Whether blocks of this architecture have experts."""
    return any(rule.stacked == "e" for rule in target.block)


def read_sizes(fields: GgufFields, target: Target) -> Sizes:
    """Read the sizes that every architecture has. Raises CheckpointError for numbers that do not go together."""
    blocks = fields.integer("block_count")
    if blocks > len(fields.header.tensors):
        raise CheckpointError(
            "the GGUF file says more blocks than it has tensors",
            where=fields.where,
            got=f"{fields.architecture}.block_count {blocks}",
            wanted=f"at most {len(fields.header.tensors)}",
        )
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_size = fields.integer("attention.key_length", max(1, hidden // heads))
    values = fields.integer("attention.value_length", head_size if hidden % heads else max(1, hidden // heads))
    if (values != head_size and not target.latent) or (target.even_heads and head_size * heads != hidden):
        raise _other_heads(fields, target.even_heads, f"keys of {head_size}, values of {values}", heads, hidden)
    experts = fields.integer("expert_count", 0, least=0)
    if experts > len(fields.header.tensors) * 2**16:
        raise CheckpointError("the GGUF file says too many experts", where=fields.where, got=experts)
    return Sizes(
        blocks=blocks,
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer("attention.head_count_kv", heads, most=heads, or_none=target.some_attention),
        head_size=head_size,
        channels=_channels(fields, target, experts),
        positions=fields.integer("context_length"),
        experts=experts,
    )


def _channels(fields: GgufFields, target: Target, experts: int) -> int:
    """Read the width of an MLP or expert; without a key of its own an expert has its share of the MLP's."""
    if target.width_key == "feed_forward_length":
        return fields.integer(target.width_key)
    shared = fields.integer("feed_forward_length", 1)
    return fields.integer(
        target.width_key, max(1, shared // fields.integer("expert_used_count", 1, most=max(1, experts)))
    )


def _other_heads(fields: GgufFields, even: bool, got: str, heads: int, hidden: int) -> UnsupportedError:
    return UnsupportedError(
        "heads of this size are not those of the architecture",
        where=fields.where,
        got=f"{got}, {heads} heads, hidden size {hidden}",
        wanted="keys and values of one size" + (", heads that share out the hidden size" if even else ""),
    )


def _field_names(model_type: str) -> set[str]:
    return {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}


def entry_name(model_type: str, family: GgufFamily, size: str) -> str:
    """Return the config's name for a size, by its usual one; empty where the config has none."""
    if size in family.names:
        return family.names[size]
    names = _field_names(model_type)
    mapped = CONFIG_MAPPING[model_type].attribute_map.get(size, "")
    return next((name for name in (size, mapped) if name in names), "")


def _sizes_in_config(model_type: str, reading: GgufReading) -> dict[str, Any]:
    """Return the config entries of the sizes. Raises UnsupportedError for one that the config cannot say."""
    sizes, family, result = reading.sizes, reading.family, dict[str, Any]()
    if family.mlp_multiple and sizes.channels != family.mlp_multiple * sizes.hidden:
        raise UnsupportedError(
            "MLPs of this architecture have a fixed width in transformers",
            where=reading.fields.where,
            got=f"{sizes.channels} channels, hidden size {sizes.hidden}",
            wanted=f"{family.mlp_multiple * sizes.hidden} channels",
        )
    for size, usual in _NAMES.items():
        name = entry_name(model_type, family, usual)
        # Without experts their number is zero.
        if name and (number := getattr(sizes, size)):
            result[name] = number
        elif size == "head_size" and not reading.target.latent and sizes.head_size * sizes.heads != sizes.hidden:
            raise _other_heads(reading.fields, True, f"heads of {sizes.head_size}", sizes.heads, sizes.hidden)
        elif size == "kv_heads" and usual not in family.names and sizes.kv_heads != sizes.heads:
            raise UnsupportedError(
                "the architecture has as many KV heads as heads",
                where=reading.fields.where,
                got=f"{sizes.kv_heads} KV heads, {sizes.heads} heads",
            )
    return result


def parsed_config(config: Mapping[str, Any], where: str) -> Any:
    """Return the stock config object. Raises CheckpointError for entries that make none."""
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(
            {name: with_infinities(each) for name, each in config.items()}
        )
    except Exception as error:
        # transformers raises many types for a config that makes no model; all of them are the input's fault.
        raise CheckpointError("transformers cannot read this configuration", where=where, got=str(error)) from error
