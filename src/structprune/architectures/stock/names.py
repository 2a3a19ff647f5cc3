"""Tensors under the names of the stock modules, whatever program wrote the files."""

from __future__ import annotations

from collections.abc import Mapping

from structprune.architectures.family import Experts
from structprune.architectures.stock.conversions import renamed_tensors
from structprune.checkpoint.reader import CheckpointReader


def with_stock_names(
    reader: CheckpointReader, *, base: str, head: str, renamed: Mapping[str, str], experts: Experts | None
) -> CheckpointReader:
    """Return a view with today's names, the base model's in front where the checkpoint was saved without a head.

    `base` and `head` are modules, `renamed` the starts of older names -> today's, beside what transformers itself
    renames. Experts that are stacked in one tensor are the tensors of their maps.
    """
    relabelled = renamed_tensors(reader.config["model_type"], reader.shapes)
    reader = reader.relabelled(relabelled) if relabelled else reader
    prefixes = {old: new for old, new in renamed.items() if any(name.startswith(old) for name in reader.shapes)}
    if not any(name.startswith(f"{base}.") for name in reader.shapes):
        prefixes |= {f"{head}.": f"{head}.", "": f"{base}."}
    view = reader.renamed(prefixes) if prefixes else reader
    return view.unstacked(experts.stacking) if experts is not None and experts.stacked else view


def with_tied_embedding(reader: CheckpointReader, embedding: str, head: str) -> CheckpointReader:
    """Return a view that holds the tied embedding where the files have it under the head's name only."""
    return reader.renamed({head: embedding}) if embedding not in reader.shapes and head in reader.shapes else reader
