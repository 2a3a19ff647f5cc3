"""The family of a checkpoint, or why it has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from structprune.architectures import FAMILIES
from structprune.architectures.family import Family
from structprune.architectures.stock.config import build_config
from structprune.architectures.traced.lookup import family_of, is_stock_decoder
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import UnsupportedError


def family_of_checkpoint(reader: CheckpointReader, usable: Mapping[str, Any]) -> Family:
    """Return the family of the checkpoint. Raises UnsupportedError where no file says it and tracing cannot."""
    model_type = reader.config["model_type"]
    if model_type in FAMILIES:
        return FAMILIES.get(model_type)
    config = build_config(reader, usable)
    if not is_stock_decoder(config):
        raise unknown_family(reader)
    return family_of(config)


def unknown_family(reader: CheckpointReader) -> UnsupportedError:
    """Build the error for a model type that is no family; for a wrapper, with the way to the text model inside."""
    model_type, architectures = reader.config.get("model_type"), str(reader.config.get("architectures"))
    wraps = "text_config" in reader.config or "ForConditionalGeneration" in architectures
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
