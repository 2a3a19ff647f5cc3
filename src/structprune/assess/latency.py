"""The table of times by which `--target-latency` is kept."""

from __future__ import annotations

from pathlib import Path

from structprune.architectures.sources.adapter import NO_ADAPTER
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.model import StockModel
from structprune.assess.speed import SpeedRequest, check_positions
from structprune.engine.run.device import machine, resolve_device, resolve_dtype
from structprune.errors import InputError
from structprune.evaluation.latency import Timing, measure_latency
from structprune.observer import Observer, SilentObserver
from structprune.recipe import Recipe
from structprune.recipe.latency import LatencyTable


def time_widths(
    model: str | Path,
    request: SpeedRequest | None = None,
    *,
    merge_adapter: str = NO_ADAPTER,
    observer: Observer | None = None,
) -> LatencyTable:
    """Time the sublayers of `model` at several widths, for one batch size and prompt length.

    Only a few blocks are in memory at a time. `observer` is told of each kind of sublayer. Raises StructPruneError.
    """
    request = request or SpeedRequest()
    if len(request.batches) > 1 or len(request.prompts) > 1:
        raise InputError(
            "a table is made for one batch size and one prompt length",
            got=f"{len(request.batches)} batch sizes, {len(request.prompts)} prompt lengths",
            wanted="one --batch and one --prompt",
        )
    recipe = Recipe.build(device=request.device, dtype=request.dtype)
    target = resolve_device(recipe.device)
    stock = StockModel(open_model(str(model), adapter=merge_adapter))
    check_positions(str(model), stock.config, request.prompts[0] + request.decode_tokens)
    timing = Timing(
        device=target,
        dtype=resolve_dtype(recipe, target),
        batch=request.batches[0],
        prompt_tokens=request.prompts[0],
        decode_tokens=request.decode_tokens,
        repeats=request.repeats,
    )
    return measure_latency(stock, timing, source=str(model), machine=machine(), observer=observer or SilentObserver())
