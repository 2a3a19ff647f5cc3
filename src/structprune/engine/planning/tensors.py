"""The tensors of a run's result, from the source's headers and the widths alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.weight_files import StoredTensor, WeightFiles
from structprune.recipe import ResolvedRecipe
from structprune.types import BlockLayout

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorForecast:
    """One tensor of the result."""

    shape: Shape
    dtype: torch.dtype


BlockTensors = Iterator[tuple[str, str, Shape]]
"""Triples: a tensor's name in the block, that of the source's tensor whose dtype it has, its shape."""


def result_tensors(
    stock: StockModel,
    recipe: ResolvedRecipe,
    blocks: Sequence[BlockLayout],
    tensors_of: Callable[[BlockLayout], BlockTensors],
    outer: Mapping[str, tuple[str, Shape]] | None = None,
) -> dict[str, TensorForecast]:
    """Find the tensors of a result that has these `blocks` of the source under new numbers.

    `outer`: name -> (source's tensor whose dtype it has, shape) of what lies around them; by default as it is.
    """
    layout, dtypes = stock.layout, stock.reader.dtypes
    form = stock.file_form(per_layer=recipe.per_layer)
    around = {name: (name, shape) for name, shape in layout.outer_tensors.items()} if outer is None else outer
    shapes = {name: shape for name, (_, shape) in around.items()}
    wanted = {form.file_name(name): dtypes[like] for name, (like, _) in around.items()}
    for number, block in enumerate(blocks):
        for name, like, shape in tensors_of(block):
            full = f"{layout.blocks_module}.{number}.{name}"
            shapes[full] = shape
            wanted[form.file_name(full)] = dtypes[block.prefix + like]
    found = {
        name: TensorForecast(shape=shape, dtype=wanted[name]) for name, shape in form.stored_shapes(shapes).items()
    }
    if (wrapper := stock.reader.wrapper) is not None:
        for name in wrapper.around:
            found[name] = TensorForecast(shape=wrapper.whole.shapes[name], dtype=wrapper.whole.dtypes[name])
    return found


def cut_tensors(block: BlockLayout, kept: Mapping[str, Sequence[int]]) -> BlockTensors:
    """List the tensors of a block that keeps so many units of each kind that it has; without units a sublayer goes."""
    gone = {kind for kind, counts in kept.items() if block.has(kind) and not counts[block.index]}
    without = {name for kind in gone for name in block.sublayer_tensors(kind)}
    shapes = {name: list(shape) for name, shape in block.shapes.items() if name not in without}
    for group in block.groups:
        if group.kind in kept and group.kind not in gone:
            removed = group.num_units - kept[group.kind][block.index]
            for part in group.slices:
                shapes[part.tensor][part.axis] -= removed * part.width * part.repeat
    yield from ((name, name, tuple(shape)) for name, shape in shapes.items())


def file_bytes(tensors: Mapping[str, TensorForecast], max_shard_size: int) -> int:
    """Count the bytes of the weight files that hold these tensors, headers included."""
    stored = [StoredTensor.planned(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    return WeightFiles.of(stored, max_shard_size).num_bytes
