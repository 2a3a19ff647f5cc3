"""The loops of the engine by name: how each reads a recipe, what it will hold in memory, and the loop itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from structprune.architectures.stock.model import StockModel
from structprune.engine.pipelines.depth import depth_request, depth_settings, execute_depth, forecast_depth
from structprune.engine.pipelines.elements import execute_elements
from structprune.engine.pipelines.elements_settings import (
    element_request,
    element_settings,
    elements_need_windows,
    forecast_elements,
)
from structprune.engine.pipelines.experts import execute_experts, expert_request, expert_settings, forecast_experts
from structprune.engine.pipelines.slice import execute_slice
from structprune.engine.pipelines.slice_settings import forecast_slice, kept_width, resolve_slice_settings
from structprune.engine.pipelines.units import execute
from structprune.engine.pipelines.units_settings import unit_settings, units_need_windows, units_request
from structprune.engine.pipelines.wrapped import check_blocks_can_go, check_stream_can_change
from structprune.engine.planning.forecast import Forecast, forecast_units
from structprune.engine.planning.plan import PlanRequest
from structprune.engine.run.context import RunContext
from structprune.methods.method import Method
from structprune.recipe import Recipe, ResolvedRecipe
from structprune.recipe.depth import DepthRecipe, ResolvedDepth
from structprune.recipe.slice import ResolvedSlice, SliceRecipe
from structprune.registry import Registry
from structprune.results.report import PruneReport
from structprune.types import UnitGroup, UnitKind

Asked = TypeVar("Asked", bound=Recipe)
Resolved = TypeVar("Resolved", bound=ResolvedRecipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline(Generic[Asked, Resolved]):
    """One loop over the blocks; `Method.pipeline` names it."""

    resolve: Callable[[Asked, Method, StockModel], tuple[Resolved, tuple[UnitGroup, ...]]]
    """The recipe with every entry filled, and the unit groups in scope. Raises StructPruneError before any work."""
    forecast: Callable[[StockModel, Resolved, Sequence[UnitKind]], Forecast]
    """What is known of the result, from (model, resolved recipe, kinds in scope). Raises StructPruneError."""
    request: Callable[[PlanRequest, Resolved, Method, StockModel], PlanRequest]
    """What the planner has to know beside what all pipelines have in common."""
    execute: Callable[[RunContext], PruneReport]
    needs_windows: Callable[[Resolved, Method], bool] = lambda recipe, method: True
    """Whether anything is chosen or solved by calibration windows before a repair; else they only report."""
    scoped: bool = False
    """Whether `--sparsity` is a share of the sublayers in scope; else of whole blocks."""
    shares_windows: bool = False
    """Whether several ranks can share its windows."""


def _resolve_depth(
    recipe: DepthRecipe, method: Method, stock: StockModel
) -> tuple[ResolvedDepth, tuple[UnitGroup, ...]]:
    check_blocks_can_go(stock)
    return depth_settings(recipe, method, stock), stock.groups


def _resolve_slice(
    recipe: SliceRecipe, method: Method, stock: StockModel
) -> tuple[ResolvedSlice, tuple[UnitGroup, ...]]:
    check_stream_can_change(stock)
    return resolve_slice_settings(recipe, method, stock), stock.groups


def _request_slice(request: PlanRequest, recipe: ResolvedSlice, method: Method, stock: StockModel) -> PlanRequest:
    assert stock.family.stream is not None
    width = kept_width(stock.layout, stock.family.stream, recipe)
    return replace(request, slices="bases" if recipe.per_layer else "one basis", sliced_hidden=width)


UNITS = Pipeline(
    resolve=unit_settings,
    forecast=forecast_units,
    request=units_request,
    execute=execute,
    needs_windows=units_need_windows,
    scoped=True,
    shares_windows=True,
)
DEPTH = Pipeline(
    resolve=_resolve_depth,
    forecast=forecast_depth,
    request=lambda request, recipe, method, stock: depth_request(request, recipe),
    execute=execute_depth,
)
EXPERTS = Pipeline(
    resolve=expert_settings,
    forecast=forecast_experts,
    request=lambda request, recipe, method, stock: expert_request(request),
    execute=execute_experts,
    scoped=True,
)
SLICE = Pipeline(resolve=_resolve_slice, forecast=forecast_slice, request=_request_slice, execute=execute_slice)

ELEMENTS = Pipeline(
    resolve=element_settings,
    forecast=forecast_elements,
    request=element_request,
    execute=execute_elements,
    needs_windows=elements_need_windows,
    scoped=True,
)

PIPELINES: Registry[Pipeline[Any, Any]] = Registry(
    "pipeline",
    Pipeline,
    {
        "units": "structprune.engine.pipelines.registry:UNITS",
        "depth": "structprune.engine.pipelines.registry:DEPTH",
        "experts": "structprune.engine.pipelines.registry:EXPERTS",
        "slice": "structprune.engine.pipelines.registry:SLICE",
        "elements": "structprune.engine.pipelines.registry:ELEMENTS",
    },
)
