"""What a slicing run is to do: which recipe entries mean something, and how wide the stream stays."""

from __future__ import annotations

import math
from collections.abc import Sequence

from structprune.architectures.family import Stream
from structprune.architectures.modeling.sliced import SHORTCUTS
from structprune.architectures.stock.model import StockModel
from structprune.engine.planning.forecast import Forecast, shape_of
from structprune.engine.planning.tensors import BlockTensors, result_tensors
from structprune.engine.planning.widths import check_shared_out
from structprune.errors import InputError, UnsupportedError
from structprune.exporters.sliced import sliced_config
from structprune.kinds import Structure
from structprune.methods.method import Method
from structprune.recipe.slice import ResolvedSlice, SliceRecipe
from structprune.results.sizes import ReachableShares
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
    if not stock.has_even_blocks:
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
    # All of them end in the stream's axis.
    outer = {name: (name, (*shape[:-1], width)) for name, shape in layout.outer_tensors.items()}
    # The head has a basis of its own.
    outer[f"{layout.head_module}.weight"] = stock.head_weight, (layout.vocab_size, width)
    config = sliced_config(layout.config, stock.config, stock.family, width, shortcuts=shortcuts)
    return Forecast(
        shape=shape_of(stock, recipe, config),
        kept=None,
        shares=sliced_shares(layout, stream, recipe),
        tensors=result_tensors(
            stock,
            recipe,
            layout.blocks,
            lambda block: sliced_tensors(block, stream, width, shortcuts=shortcuts),
            outer,
        ),
    )


def sliced_tensors(block: BlockLayout, stream: Stream, width: int, *, shortcuts: bool) -> BlockTensors:
    """List the tensors of a block whose stream has `width` dimensions, its shortcut matrices with them."""
    cut: dict[str, int] = {}
    for sublayer in stream.sublayers:
        cut |= {f"{sublayer.norm}.weight": 0, f"{sublayer.writer}.weight": 0, f"{sublayer.writer}.bias": 0}
        # A reader's bias is as long as its output, which stays.
        cut |= {f"{name}.weight": 1 for name in sublayer.readers}
        if shortcuts:
            yield f"{SHORTCUTS[sublayer.kind]}.weight", f"{sublayer.writer}.weight", (width, width)
    for name, shape in block.shapes.items():
        axis = cut.get(name)
        yield name, name, shape if axis is None else (*shape[:axis], width, *shape[axis + 1 :])


def sliced_parameters(block: BlockLayout, stream: Stream, width: int, *, shortcuts: bool) -> int:
    """Count the parameters of a block whose stream has `width` dimensions, its shortcut matrices counted."""
    return sum(math.prod(shape) for _, _, shape in sliced_tensors(block, stream, width, shortcuts=shortcuts))


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
        return _removed(layout, stream, recipe, width)

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


def sliced_shares(layout: ModelLayout, stream: Stream, recipe: ResolvedSlice) -> ReachableShares:
    """Return what share of the blocks' parameters goes, and what the next wider stream would remove."""
    width = kept_width(layout, stream, recipe)
    removed = _removed(layout, stream, recipe, width) / layout.block_parameters
    wider = width + recipe.multiple_of
    below = _removed(layout, stream, recipe, wider) / layout.block_parameters if wider <= layout.hidden_size else 0.0
    return ReachableShares(removed=removed, below=max(0.0, below), above=removed)


def _removed(layout: ModelLayout, stream: Stream, recipe: ResolvedSlice, width: int) -> int:
    shortcuts = recipe.structure == Structure.PER_LAYER
    return layout.block_parameters - sum(
        sliced_parameters(block, stream, width, shortcuts=shortcuts) for block in layout.blocks
    )
