"""What can be done to a text model inside an image-text model: what the model around it still fits."""

from __future__ import annotations

from collections.abc import Sequence

from structprune.allocation import ALLOCATORS
from structprune.architectures.stock.model import StockModel
from structprune.engine.planning.widths import are_even
from structprune.errors import UnsupportedError
from structprune.kinds import Structure
from structprune.recipe.units import UnitsRecipe
from structprune.types import UnitGroup, UnitKind


def evenly_inside(recipe: UnitsRecipe, groups: Sequence[UnitGroup], stock: StockModel) -> UnitsRecipe:
    """Ask for equal widths in a text model inside another model; any other recipe stays as it is.

    Raises UnsupportedError for settings that give blocks widths of their own: the modelling file that such blocks need
    is one of causal models.
    """
    if stock.reader.wrapper is None:
        return recipe
    uneven = _uneven(recipe, groups, stock)
    if uneven is not None:
        raise UnsupportedError(
            f"the text model of {stock.reader.wrapper.config.get('model_type')} keeps one width for all blocks: no "
            "stock class builds others inside another model",
            where=str(stock.reader.directory),
            got=uneven,
            do="use --structure uniform, without settings that treat blocks differently",
        )
    return recipe.model_copy(update={"structure": Structure.UNIFORM})


def _uneven(recipe: UnitsRecipe, groups: Sequence[UnitGroup], stock: StockModel) -> str | None:
    """Name the first setting under which blocks would differ, or heads have fewer value channels; None without one."""
    kinds: list[UnitKind] = list(dict.fromkeys(group.kind for group in groups))
    if recipe.structure is Structure.PER_LAYER:
        return f"--structure {Structure.PER_LAYER}"
    if "attention" in kinds and stock.head_units == "value-channel":
        return "--head-units value-channel"
    if recipe.widths.blocks:
        return None if are_even(stock, kinds, recipe.widths) else "--widths with different numbers"
    if recipe.allocator is not None and not ALLOCATORS.get(ALLOCATORS.check(recipe.allocator)).even:
        return f"--allocator {recipe.allocator}"
    for flag, value in (("--protect-first", recipe.protect_first), ("--protect-last", recipe.protect_last)):
        if value:
            return f"{flag} {value}"
    return "--allow-block-removal" if recipe.allow_block_removal else None


def check_stream_can_change(stock: StockModel) -> None:
    """Raise UnsupportedError where other parts write into the residual stream, as a projector of images does."""
    if stock.reader.wrapper is not None:
        raise UnsupportedError(
            "images enter the residual stream by a projector, so its dimensions stay",
            where=str(stock.reader.directory),
            got=f"model_type {stock.reader.wrapper.config.get('model_type')}",
            do="use a method that removes units or blocks",
        )


def check_blocks_can_go(stock: StockModel) -> None:
    """Raise UnsupportedError where what is found in images is added behind blocks by their number."""
    if stock.reader.wrapper is not None and stock.reader.wrapper.enters_between_blocks:
        raise UnsupportedError(
            f"what {stock.reader.wrapper.config.get('model_type')} finds in images is added behind blocks by their "
            "number, so none of them can be removed",
            where=str(stock.reader.directory),
            do="use a method that removes units",
        )
