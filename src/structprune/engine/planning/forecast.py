"""What is known of a run's result before any work: its config, its widths, its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from structprune.allocation import ALLOCATORS
from structprune.architectures.modeling.value_channels import has_narrow_values
from structprune.architectures.stock.model import StockModel
from structprune.engine.planning.widths import (
    Widths,
    check_shared_out,
    choose_widths,
    indivisible,
    removed_parameters,
    sublayers,
)
from structprune.exporters.per_layer import per_layer_config
from structprune.exporters.runtimes import ResultShape, result_shape
from structprune.exporters.uniform import uniform_config
from structprune.kinds import Structure, UnitKind
from structprune.recipe import Recipe
from structprune.recipe.units import ResolvedUnits
from structprune.solvers import SOLVERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The result as far as the recipe alone decides it."""

    shape: ResultShape
    kept: Widths | None
    """None where the calibration text decides, or where no units are removed."""
    num_parameters: int | None
    """None where the calibration text decides, or where biases are added."""


def forecast_units(stock: StockModel, recipe: ResolvedUnits, kinds: Sequence[UnitKind]) -> Forecast:
    """Forecast a run that removes units. Raises InputError or UnsupportedError if it cannot be reached or written."""
    if ALLOCATORS.get(recipe.allocator).compares != "none":
        # A block that the allocator leaves alone keeps its width even if that is no multiple.
        check_shared_out(stock, recipe, {})
        shape = ResultShape(
            model_type=stock.config.model_type,
            structure=Structure.PER_LAYER,
            tied=stock.layout.tied_embeddings,
            narrow_values=("attention" in kinds and recipe.head_units == "value-channel")
            or has_narrow_values(stock.layout.config),
            removed_sublayers=recipe.allow_block_removal or any(len(kinds) == 1 for kinds in stock.removed),
            tensor_parallel=recipe.tensor_parallel,
        )
        return Forecast(shape=shape, kept=None, num_parameters=None)
    kept = choose_widths(stock, recipe, kinds, None)
    removed = sum(
        removed_parameters(block, group, kept[group.kind][block.index]) for block, group in sublayers(stock, kinds)
    )
    return Forecast(
        shape=shape_of(stock, recipe, output_config(stock, recipe, kinds, kept)),
        kept=kept,
        num_parameters=None if _adds_bias(recipe) else stock.layout.num_parameters - removed,
    )


def output_config(
    stock: StockModel, recipe: ResolvedUnits, kinds: Sequence[UnitKind], kept: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Build the result's config.json. Raises UnsupportedError if no stock class takes it."""
    source = dict(stock.layout.config)
    for group in stock.groups:
        adds_bias = _adds_bias(recipe) and group.kind in kinds and group.consumer_bias is None
        if adds_bias and group.bias_field is not None:
            source[group.bias_field] = True
    if recipe.per_layer:
        return per_layer_config(source, stock, kept)
    widths = {kind: counts[0] for kind, counts in kept.items()}
    return uniform_config(source, stock.groups, widths, stock.family)


def _adds_bias(recipe: ResolvedUnits) -> bool:
    return "biases" in SOLVERS.get(recipe.solver).changes


def shape_of(
    stock: StockModel, recipe: Recipe, config: Mapping[str, Any], kept: Mapping[str, Sequence[int]] | None = None
) -> ResultShape:
    """Return the shape of `stock`'s result with this config, which says so if the head was untied."""
    return result_shape(
        config,
        tied=stock.layout.tied_embeddings and config.get("tie_word_embeddings", True) is not False,
        tensor_parallel=recipe.tensor_parallel,
        indivisible=indivisible(stock, recipe.tensor_parallel, kept or {}),
    )
