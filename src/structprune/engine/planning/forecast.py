"""What is known of a run's result before any work: its config, its widths, its size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from structprune.allocation import ALLOCATORS
from structprune.architectures.stock.model import StockModel
from structprune.engine.planning.limits import Limit, find_limits
from structprune.engine.planning.tensors import TensorForecast, cut_tensors, file_bytes, result_tensors
from structprune.engine.planning.widths import Widths, check_shared_out, choose_widths, indivisible, reachable_shares
from structprune.exporters.per_layer import per_layer_config
from structprune.exporters.runtimes import ResultShape, result_shape
from structprune.exporters.uniform import uniform_config
from structprune.kinds import UnitKind
from structprune.recipe import Recipe, ResolvedRecipe
from structprune.recipe.units import ResolvedUnits
from structprune.results.sizes import ReachableShares
from structprune.solvers import SOLVERS


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedZeros:
    """Zeros of a result whose single weights go."""

    pattern: str
    share: float
    weights: int
    """Weights of the matrices in scope."""
    sums: str
    """What is summed of their inputs, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The result as far as the recipe alone decides it."""

    shape: ResultShape
    kept: Widths | None
    """None where the calibration text decides, or where no units are removed."""
    shares: ReachableShares | None
    """What share of the scope goes; None where the calibration text decides."""
    tensors: Mapping[str, TensorForecast] | None
    """Name in the result's files -> tensor; None where the calibration text decides, or where biases are added."""
    limits: Sequence[Limit] = ()
    """What decides the widths, where a share does not."""
    zeros: PlannedZeros | None = None
    """What becomes zero, where single weights go."""

    @property
    def num_parameters(self) -> int | None:
        """Parameters of the result, where its tensors are known."""
        return None if self.tensors is None else sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def num_bytes(self, max_shard_size: int) -> int | None:
        """Count the bytes of the result's weight files, headers included, where its tensors are known."""
        return None if self.tensors is None else file_bytes(self.tensors, max_shard_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSize:
    """Bytes of the weight files, before and after."""

    bytes_before: int
    bytes_after: int
    exact: bool
    """Whether it is what the files will have; else what remains if just the asked share goes."""
    dtypes: list[str]
    """What the weights will be stored in, that of the most bytes first."""


def planned_size(
    stock: StockModel, recipe: ResolvedRecipe, kinds: Sequence[UnitKind], forecast: Forecast
) -> PlannedSize:
    """Count the bytes of the weight files: those of the forecast, or less the share of the scope that is asked for."""
    reader, layout = stock.reader, stock.layout
    after = forecast.num_bytes(recipe.max_shard_size)
    exact = after is not None
    if after is None:
        in_scope = {
            block.prefix + name
            for block in layout.blocks
            for group in block.groups
            if group.kind in kinds
            for name in block.module_tensors(group)
        }
        after = (
            layout.around.num_bytes
            + reader.num_bytes(layout.tensors)
            - round(recipe.sparsity * reader.num_bytes(in_scope))
        )
    return PlannedSize(
        bytes_before=reader.file_bytes, bytes_after=after, exact=exact, dtypes=reader.dtype_names(layout.tensors)
    )


def forecast_units(stock: StockModel, recipe: ResolvedUnits, kinds: Sequence[UnitKind]) -> Forecast:
    """Forecast a run that removes units. Raises InputError or UnsupportedError if it cannot be reached or written."""
    if ALLOCATORS.get(recipe.allocator).compares != "none" or recipe.searches:
        # A block that the allocator leaves alone keeps its width even if that is no multiple.
        check_shared_out(stock, recipe, {})
        before = shape_of(stock, recipe, stock.layout.config)
        attention = "attention" in kinds
        shape = replace(
            before,
            structure=recipe.structure,
            narrow_values=before.narrow_values or (attention and recipe.head_units == "value-channel"),
            removed_sublayers=before.removed_sublayers or recipe.allow_block_removal,
            removed_attention=before.removed_attention or (attention and recipe.allow_block_removal),
            query_heads="unknown" if attention and recipe.head_units != "value-channel" else before.query_heads,
            uneven_experts=before.uneven_experts or ("mlp" in kinds and stock.family.experts is not None),
            # What the allocator decides is seen to divide when it is known.
            indivisible=None,
        )
        shares = reachable_shares(stock, recipe, kinds, None)
        return Forecast(shape=shape, kept=None, shares=shares, tensors=None, limits=find_limits(stock, recipe, kinds))
    kept = choose_widths(stock, recipe, kinds, None)
    blocks = stock.layout.blocks
    return Forecast(
        shape=shape_of(stock, recipe, output_config(stock, recipe, kinds, kept)),
        kept=kept,
        shares=reachable_shares(stock, recipe, kinds, kept),
        limits=find_limits(stock, recipe, kinds),
        tensors=None
        if _adds_bias(recipe)
        else result_tensors(stock, recipe, blocks, lambda block: cut_tensors(block, kept)),
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
    counted = [
        (group, kept[group.kind][block.index])
        for block in stock.layout.blocks
        for group in block.groups
        if group.kind in kept
    ]
    return uniform_config(source, counted, stock.family)


def _adds_bias(recipe: ResolvedUnits) -> bool:
    return "biases" in SOLVERS.get(recipe.solver).changes


def retyped(source: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, ...]:
    """Say that the result has another model type than the source; nothing where it has the same."""
    before, after = source.get("model_type"), result.get("model_type")
    if before == after:
        return ()
    return (
        f"model_type in config.json is {after}, and {before} in the source: stock {before} takes no such numbers of "
        f"heads, and {after} computes the same with them",
    )


def shape_of(
    stock: StockModel, recipe: Recipe, config: Mapping[str, Any], kept: Mapping[str, Sequence[int]] | None = None
) -> ResultShape:
    """Return the shape of `stock`'s result with this config, which says so if the head was untied."""
    return result_shape(
        config,
        tied=stock.layout.tied_embeddings and config.get("tie_word_embeddings", True) is not False,
        wrapper=None if (wrapper := stock.reader.wrapper) is None else str(wrapper.config.get("model_type")),
        tensor_parallel=recipe.tensor_parallel,
        indivisible=indivisible(stock, recipe.tensor_parallel, kept or {}),
    )
