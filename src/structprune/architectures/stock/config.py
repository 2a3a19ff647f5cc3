"""The checkpoint's config as stock code can build it: entries that say nothing are left out, and named."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import UnsupportedError

# Entries that say how weights are stored; every tensor of a reader is a float of at least 16 bits.
_QUANTISATION = ("quantization_config", "compression_config")
_DTYPES = ("dtype", "torch_dtype")
# What a call returns beside the logits is the caller's to say; stock code refuses some where attention is not eager.
_OUTPUTS = {"output_attentions": False, "output_hidden_states": False}
_NO_LIMIT = 2**31 - 1

BLOCK_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Entries of configs that have one value for each block."""


def usable_config(reader: CheckpointReader) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return config.json without entries that have no meaning beside these weights, and what was found of them.

    Raises UnsupportedError for a quantisation that the config announces and the weights do not have: stock code would
    quantise them while it loads, so what was calibrated would not be what runs.
    """
    config = dict(reader.config)
    notes: list[str] = []
    for name in _QUANTISATION:
        if name not in config:
            continue
        if value := config.pop(name):
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            stored = sorted({str(dtype).removeprefix("torch.") for dtype in reader.dtypes.values()})
            raise UnsupportedError(
                f"config.json announces a quantisation that the weights do not have ({name} is left over)",
                where=str(reader.directory / "config.json"),
                got=f"quant_method {method!r} beside weights in {', '.join(stored)}",
                wanted=f"no {name} beside weights that are not quantised",
                do=f"remove {name} from config.json if the weights are the merged or dequantised ones",
            )
        notes.append(f"{name} in config.json is empty and left out: the weights are not quantised")
    if config.get("return_dict") is False:
        del config["return_dict"]
        notes.append("return_dict: false in config.json is left out: stock code cannot run the model with it")
    return config | _agreeing_dtype(reader, notes), tuple(notes)


def _agreeing_dtype(reader: CheckpointReader, notes: list[str]) -> dict[str, Any]:
    """Return the entry for the weights' dtype, where config.json says another or none and that matters; note why."""
    read = reader.dtype_names(reader.shapes)[0]
    names = [name for name in _DTYPES if reader.config.get(name) is not None]
    if reader.width is not None:
        # Asked for, so there is nothing to note.
        return dict.fromkeys(names or _DTYPES[:1], read)
    corrected: dict[str, Any] = {}
    for name in names:
        said = reader.config[name]
        if said == "auto":
            notes.append(f"{name} in config.json is 'auto', which names no dtype: read as {read}")
        elif said != read:
            notes.append(f"{name} in config.json is {said} and the weights are {read}: read and written as {read}")
        corrected[name] = read
    return corrected


def max_positions(config: Any) -> int:
    """Return how many positions a model has; without a limit, as where attention has slopes, a very large number."""
    return getattr(config, "max_position_embeddings", None) or _NO_LIMIT


@functools.lru_cache
def stock_layer_entries(model_type: str) -> frozenset[str]:
    """Return the entries that stock code itself says per block in configs of this type, such as sizes of heads."""
    own: Any = CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else None
    return frozenset(getattr(own, "per_layer_attributes", None) or ())


def has_own_layers(config: Mapping[str, Any]) -> bool:
    """Whether config.json, read as JSON, gives single blocks widths that stock code does not, as a pruning does."""
    said: Any = config.get("per_layer_config")
    if not isinstance(said, dict):
        return "per_layer_config" in config
    stock = stock_layer_entries(str(config.get("model_type")))
    return not stock or any(name not in stock for fields in said.values() for name in fields)


def without_own_widths(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config with what stock code itself says per block, and no widths that a pruning gave single blocks."""
    result: Any = copy.deepcopy(config)
    entries = stock_layer_entries(config.model_type)
    said: dict[str, dict[str, Any]] = config.to_dict().get("per_layer_config") or {}
    kept = {
        int(index): {name: value for name, value in fields.items() if name in entries} for index, fields in said.items()
    }
    result.per_layer_config = {index: fields for index, fields in kept.items() if fields} or None
    result.allow_global_per_layer_attribute_access = True
    return result


def with_few_tokens(config: PretrainedConfig, num_tokens: int) -> PretrainedConfig:
    """Copy a config, so that its model, or the text model inside, has so few tokens; its weights are float32."""
    small: Any = copy.deepcopy(config)
    text = small.get_text_config()
    text.vocab_size = num_tokens
    # Numbers that are computed as a model is built would be rounded to the type of its weights.
    small.dtype = text.dtype = torch.float32
    if isinstance(text.pad_token_id, int) and text.pad_token_id >= num_tokens:
        text.pad_token_id = 0
    return small


def build_config(reader: CheckpointReader, usable: Mapping[str, Any], **settings: Any) -> PretrainedConfig:
    """Return the stock config of the checkpoint with `usable` in the place of the entries that it corrected.

    Switches of what a call returns are set as this package's calls need them; the output's config.json keeps its own.
    """
    settings |= _OUTPUTS
    if reader.wrapper is not None:
        # Every entry of it is written out, as stock code has read it.
        return AutoConfig.for_model(**{**usable, **settings})
    corrected = {name: usable[name] for name in _DTYPES if usable.get(name) != reader.config.get(name)}
    return AutoConfig.from_pretrained(
        str(reader.directory), local_files_only=True, trust_remote_code=False, **corrected, **settings
    )


def with_infinities(value: Any) -> Any:
    """Return an entry with the infinite numbers that transformers spells out in JSON."""
    if isinstance(value, list):
        return [with_infinities(each) for each in value]  # pyright: ignore[reportUnknownVariableType]
    return float(value["__float__"]) if isinstance(value, dict) and list(value) == ["__float__"] else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
