"""The table of times by which `--target-latency` is kept, and what the time of a result has become."""

from __future__ import annotations

from pathlib import Path

from structprune.architectures.sources.adapter import NO_ADAPTER
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.model import StockModel
from structprune.assess.speed import SpeedRequest, check_positions
from structprune.engine.run.device import machine, resolve_device, resolve_dtype
from structprune.errors import InputError
from structprune.evaluation.latency import Timing, measure_latency
from structprune.files import write_json
from structprune.observer import Observer, SilentObserver
from structprune.recipe import Recipe
from structprune.recipe.latency import NO_LATENCY_LIMIT, NO_TABLE, LatencyLimit, LatencyTable
from structprune.report.rebuild import read_report, rebuild
from structprune.results.measured import Bench, SpeedPoint
from structprune.results.schema import REPORT_NAME


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


def record_time(output: Path, measured: Bench) -> str | None:
    """Write into the report of a run with a limit of time what its result was measured to take; returns that in words.

    Only a measurement of what the limit is about counts: the table's device, number format, batch and prompt. A limit
    that is a share of the dense model's time counts beside that model, in the same minute. None: nothing was written.
    """
    if not (output / REPORT_NAME).is_file():
        return None
    report = read_report(output)
    limit: LatencyLimit = getattr(report.recipe, "target_latency", NO_LATENCY_LIMIT)
    table: LatencyTable = getattr(report.recipe, "latency_table", NO_TABLE)
    if not limit or not table or (measured.device, measured.dtype) != (table.device, table.dtype):
        return None
    shape = (table.batch, table.prompt_tokens)
    point = next((p for p in measured.models[0].points if (p.batch, p.prompt_tokens) == shape), None)
    taken = None if point is None else _nanoseconds(point, limit, table)
    if taken is None:
        return None
    limits = [
        one.model_copy(update={"reached": taken}) if one.counts == "nanoseconds" else one for one in report.limits
    ]
    write_json(output / REPORT_NAME, report.model_copy(update={"limits": limits}).to_dict())
    rebuild(output)
    line = next(one.line for one in limits if one.counts == "nanoseconds")
    return f"limit of time: {line} (written into {output / REPORT_NAME})"


def _nanoseconds(point: SpeedPoint, limit: LatencyLimit, table: LatencyTable) -> int | None:
    """Return the time of a prompt or of a token; of a share that much of the table's, None without the dense model."""
    prefill = limit.phase == "prefill"
    if limit.share:
        ratio = point.prefill_ratio if prefill else point.decode_ratio
        return None if ratio is None else round(table.whole(limit.phase) / ratio)
    if prefill:
        return round(1e9 * point.batch * point.prompt_tokens / point.prefill.median)
    return round(1e9 * point.batch / point.decode.median)
