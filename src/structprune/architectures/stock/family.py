"""The family of a checkpoint, or why it has none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from structprune.architectures import FAMILIES
from structprune.architectures.family import Family
from structprune.architectures.stock.classes import other_kind, wraps_text_model
from structprune.architectures.stock.config import build_config
from structprune.architectures.traced.lookup import family_of, is_stock_decoder
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, UnsupportedError

_MOST_CUT = 64
"""How many times as large as any tensor those of a block may be that had all their units."""


def family_of_checkpoint(reader: CheckpointReader, usable: Mapping[str, Any]) -> Family:
    """Return the family of the checkpoint. Raises UnsupportedError where no file says it and tracing cannot."""
    model_type = reader.config["model_type"]
    if model_type in FAMILIES:
        return FAMILIES.get(model_type)
    config = build_config(reader, usable)
    if not is_stock_decoder(config):
        raise unknown_family(reader)
    _check_sizes(reader, config)
    try:
        return family_of(config)
    except UnsupportedError as error:
        # Stock code makes decoders of encoders too, with a head that the checkpoint has not.
        other = other_kind(reader.config, reader.directory)
        if other is None:
            raise
        raise other from error


def _check_sizes(reader: CheckpointReader, config: PretrainedConfig) -> None:
    """Raise CheckpointError for a config of larger matrices than the checkpoint has: what is run here is as large."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # Experts may be stacked in the model and apart in the files; blocks may have fewer units than the config's global
    # numbers say.
    sizes = {
        name: each.numel() // (_MOST_CUT if any(part.isdigit() for part in name.split(".")) else 1)
        for name, each in skeleton.named_parameters()
        if each.ndim < 3
    }
    name = max(sizes, key=lambda each: sizes[each])
    stored = max(math.prod(shape) for shape in reader.shapes.values())
    if sizes[name] > stored:
        raise CheckpointError(
            "the configuration has a tensor that is larger than any of the checkpoint",
            where=str(reader.directory / "config.json"),
            got=f"{name}, {sizes[name]} numbers",
            wanted=f"at most {stored}",
            do="check that config.json belongs to the checkpoint",
        )


def unknown_family(reader: CheckpointReader) -> UnsupportedError:
    """Build the error for a model type that is no family, with the way there is: for a wrapper, for another kind."""
    other = other_kind(reader.config, reader.directory)
    if other is not None:
        return other
    model_type, architectures = reader.config.get("model_type"), str(reader.config.get("architectures"))
    wraps = wraps_text_model(reader.config) or "ForConditionalGeneration" in architectures
    return UnsupportedError(
        f"{model_type} wraps a text model together with other parts" if wraps else "unknown model family",
        where=str(reader.directory / "config.json"),
        got=f"model_type {model_type!r}",
        wanted=", ".join(FAMILIES),
        do="save the text model that it wraps by itself and prune that: with transformers, the causal model of its "
        "text_config with the weights below `language_model`"
        if wraps
        else "see docs/add-an-architecture.md: a family is one file of data",
    )
