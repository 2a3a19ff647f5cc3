"""What a slicing run is to do: which recipe entries mean something, and how wide the stream stays."""

from __future__ import annotations

import math
from collections.abc import Sequence

from structprune.architectures.family import Stream
from structprune.architectures.stock.model import StockModel
from structprune.engine.planning.forecast import Forecast, shape_of
from structprune.engine.planning.widths import check_shared_out
from structprune.errors import InputError, UnsupportedError
from structprune.exporters.sliced import sliced_config
from structprune.kinds import Structure
from structprune.methods.method import Method
from structprune.recipe.slice import ResolvedSlice, SliceRecipe
from structprune.types import BlockLayout, ModelLayout, UnitKind


def resolve_slice_settings(recipe: SliceRecipe, method: Method, stock: StockModel) -> ResolvedSlice:
    """Fill what the recipe leaves open. Raises UnsupportedError for a model or a combination without a meaning."""
    if recipe.scope != "all":
        raise UnsupportedError(
            f"method {method.name!r} cuts the stream that attention and MLP share",
            got=f"--scope {recipe.scope}",
            wanted="--scope all",
        )
    if stock.family.stream is None:
        raise UnsupportedError(
            f"method {method.name!r} rotates the residual stream, which needs RMSNorm and a family that describes it",
            got=stock.family.name,
            wanted="such as llama, mistral, qwen2",
            do="use another --method",
        )
    if any(block.groups != stock.groups for block in stock.layout.blocks):
        raise UnsupportedError(
            "the source's blocks have different widths, or some lack a sublayer",
            wanted="blocks of one width",
            do="slice the dense model instead",
        )
    return ResolvedSlice.of(recipe, damping=recipe.damping or method.damping)


def forecast_slice(stock: StockModel, recipe: ResolvedSlice, kinds: Sequence[UnitKind]) -> Forecast:
    """Forecast all of the result.

    Raises InputError if no width removes as much, UnsupportedError if the result cannot be written or shared.
    """
    check_shared_out(stock, recipe, {})
    stream, layout = stock.family.stream, stock.layout
    assert stream is not None
    width = kept_width(layout, stream, recipe)
    shortcuts = recipe.structure == Structure.PER_LAYER
    outer = {name: math.prod(shape) // layout.hidden_size * width for name, shape in layout.outer_tensors.items()}
    blocks = sum(sliced_parameters(b, stream, layout.hidden_size, width, shortcuts=shortcuts) for b in layout.blocks)
    # The head has a basis of its own.
    head = layout.vocab_size * width if layout.tied_embeddings else 0
    config = sliced_config(layout.config, stock.config, stock.family, width, shortcuts=shortcuts)
    return Forecast(
        shape=shape_of(stock, recipe, config), kept=None, num_parameters=blocks + sum(outer.values()) + head
    )


def sliced_parameters(block: BlockLayout, stream: Stream, hidden: int, width: int, *, shortcuts: bool) -> int:
    """Count the parameters of a block whose stream has `width` of `hidden` dimensions, with its shortcut matrices."""
    total = block.num_parameters
    for sublayer in stream.sublayers:
        touched = [sublayer.norm, *sublayer.readers, sublayer.writer]
        for name, shape in block.shapes.items():
            module = name.rpartition(".")[0]
            # A reader's bias is as long as its output, which stays.
            if module in touched and not (name.endswith(".bias") and module in sublayer.readers):
                total -= math.prod(shape) // hidden * (hidden - width)
        total += width * width if shortcuts else 0
    return total


def kept_width(layout: ModelLayout, stream: Stream, recipe: ResolvedSlice) -> int:
    """Find the largest width of the stream, a multiple of `multiple_of`, that removes enough parameters.

    That is `sparsity` of the blocks' parameters, where those of the shortcuts count against it. Raises InputError,
    naming the largest share, if no width removes as much.
    """
    shortcuts = recipe.structure == Structure.PER_LAYER
    hidden, before = layout.hidden_size, layout.block_parameters
    if recipe.multiple_of > hidden:
        raise InputError(
            "--multiple-of is wider than the residual stream",
            got=recipe.multiple_of,
            wanted=f"at most the hidden size, {hidden}",
        )

    def removed(width: int) -> int:
        return before - sum(sliced_parameters(b, stream, hidden, width, shortcuts=shortcuts) for b in layout.blocks)

    for width in range(hidden // recipe.multiple_of * recipe.multiple_of, 0, -recipe.multiple_of):
        # A share that is met exactly must not fail by the product's rounding.
        if removed(width) >= recipe.sparsity * before * (1 - 1e-12):
            return width
    raise InputError(
        "no width of the residual stream removes as much",
        got=f"--sparsity {recipe.sparsity:g}, --multiple-of {recipe.multiple_of}",
        wanted=f"at most {int(removed(recipe.multiple_of) / before * 1e4) / 1e4:g}",
        do="lower --sparsity" + (", or use --structure uniform, which needs no shortcuts" if shortcuts else ""),
    )
