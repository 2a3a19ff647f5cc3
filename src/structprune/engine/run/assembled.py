"""A checkpoint of a run's shards, by links, that stock blocks are built from before the output is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.run.context import RunContext
from structprune.exporters.per_layer import write_modeling_file
from structprune.files import empty_folder, write_json


def assembled(
    context: RunContext,
    writer: ModelWriter,
    config: Mapping[str, Any],
    directory: Path,
    added: Mapping[str, Tensor] | None = None,
) -> StockModel:
    """Open the shards of `writer` and the tensors `added`, which no shard has, as a model with this config.

    `directory` is emptied; nothing else reads it.
    """
    empty_folder(directory)
    write_json(directory / "config.json", config)
    if context.recipe.per_layer:
        write_modeling_file(directory, context.stock.family, config)
    writer.link(directory, added)
    return StockModel(context.reader.beside(directory))
