"""`structprune plan`: what a run would take and give, before any work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structprune.cli.flags import JsonFlag, ModelArgument
from structprune.cli.settings import takes_recipe
from structprune.recipe.path import CurvePoint, read_path

if TYPE_CHECKING:
    from structprune.api import RunPlan
    from structprune.engine.planning.forecast import PlannedZeros
    from structprune.engine.planning.limits import Limit
    from structprune.engine.planning.plan import DevicePlan, PrunePlan

_CURVE_ROWS = 20


@takes_recipe
def plan(
    model: ModelArgument,
    # A Recipe, from the options that `takes_recipe` adds.
    settings: Any,
    allocation: Path | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what `prune` with the same options would do, and which runtimes will load the result. Reads headers only.

    With --allocation also the predicted loss at every size.
    """
    from structprune.api import plan as run_plan
    from structprune.cli.render import runtime_rows
    from structprune.cli.tables import print_pairs

    found = run_plan(model, settings, timed=True)
    curve = [] if allocation is None else read_path(allocation).curve()
    if as_json:
        print(json.dumps({**_as_dict(found), "curve": [asdict(point) for point in curve]}, indent=2))
        return
    print_pairs(f"structprune plan {model}", [*_rows(found), *runtime_rows(found.runtimes)])
    if curve:
        _print_curve(curve, found)


def _print_curve(curve: Sequence[CurvePoint], found: RunPlan) -> None:
    """Print the predicted loss at about twenty sizes, each the next that can be had, and at the one that is asked."""
    from structprune.cli.tables import Column, print_table

    asked = next(point for point in curve if point.share >= found.recipe.sparsity * (1 - 1e-9))
    steps = [number / _CURVE_ROWS * curve[-1].share for number in range(_CURVE_ROWS + 1)]
    shown = [next(point for point in curve if point.share >= step * (1 - 1e-9)) for step in steps]
    rows = sorted({point.removed: point for point in (*shown, asked)}.values(), key=lambda point: point.removed)
    print_table(
        "Predicted loss against size: the best widths of each",
        [Column(name=name, figures=True) for name in ("removed of the scope", "parameters", "predicted loss", "")],
        [
            (
                f"{point.share:.1%}",
                f"{found.layout.all_parameters - point.removed:,}",
                f"{point.loss:.4f}",
                "about what is asked" if point is asked else "",
            )
            for point in rows
        ],
    )


def _rows(found: RunPlan) -> list[tuple[str, str]]:
    from structprune.engine.run.pace import in_words
    from structprune.memory import format_bytes
    from structprune.results.summary import beginning

    memory = found.plan
    zeros = found.forecast.zeros
    how = f"{'per-layer' if found.recipe.per_layer else 'uniform'} widths" if zeros is None else "single weights"
    before, after, around = found.parameters_before, found.forecast.num_parameters, found.layout.around.parameters
    tokens = found.tokens
    size = "the calibration text decides" if after is None else f"{after:,} ({1 - after / before:.1%} fewer)"
    rows = [
        ("method", f"{found.recipe.method}, {how}"),
        *_zero_rows(zeros),
        *([] if tokens is None else [("tokens", f"{tokens.before:,} -> {tokens.after:,}")]),
        ("parameters", f"{before:,} -> {size}"),
        *([("  around the text model", f"{around:,}, copied as they are")] if around else []),
        (
            "bytes on disk",
            f"{format_bytes(found.size.bytes_before)} -> {'' if found.size.exact else 'about '}"
            f"{format_bytes(found.size.bytes_after)}, in {' and '.join(found.size.dtypes)}",
        ),
    ]
    rows += [(f"limit of {limit.name}", _limit_line(limit, found)) for limit in found.forecast.limits]
    if found.time is not None:
        rows.append(("time", f"{in_words(found.time.seconds)} on this machine"))
        rows += [(f"  {name}", f"{seconds:,.0f} s") for name, seconds in found.time.stretches.items()]
    for kind, counts in (found.forecast.kept or {}).items():
        low, high = min(counts), max(counts)
        rows.append((f"{kind} units kept", f"{low} per block" if low == high else f"{low} to {high} per block"))
    rows += [
        ("windows", "the tokenizer cannot be loaded" if found.start is None else beginning(found.start)),
        *_peak_rows("peak memory", memory),
        (
            "hidden states",
            f"{format_bytes(memory.store_bytes)} in {'memory' if memory.store == 'memory' else 'a file'}, "
            f"{memory.micro_batch_windows} windows at a time",
        ),
        (
            "activations kept",
            f"{' and '.join(memory.cached)}, {format_bytes(memory.cache_bytes)}" if memory.cached else "none",
        ),
        ("disk", f"{format_bytes(memory.disk_bytes)} at its peak"),
    ]
    if (device := memory.device) is not None:
        place = "on the device" if device.sums == "device" else "in host memory, where every product is moved"
        rows += [
            *_peak_rows("peak device memory", device),
            ("sums of activations", place),
            ("choices and solves", "on the device" if device.solves == "device" else "on the host"),
        ]
    check = "left out"
    if memory.reload_mode is not None:
        how = "the whole model" if memory.reload_mode == "whole" else "module by module"
        check = f"{how}, {format_bytes(memory.reload_bytes)} in both processes"
    return [*rows, ("reload check", check), *(("note", note) for note in found.notes)]


def _zero_rows(zeros: PlannedZeros | None) -> list[tuple[str, str]]:
    """Say how many weights become zero, and what is summed to choose them; nothing where units go."""
    if zeros is None:
        return []
    count = round(zeros.share * zeros.weights)
    return [
        ("zeros", f"{zeros.share:.2%} of {zeros.weights:,} weights, {count:,} in all; pattern {zeros.pattern}"),
        ("sums of inputs", zeros.sums),
    ]


def _limit_line(limit: Limit, found: RunPlan) -> str:
    """Say what is asked of a quantity, what it is with all units, and where widths are known what it will be."""
    kept = found.forecast.kept
    will_be = "" if kept is None or not limit.sizes else f", {limit.predicted(kept):,} predicted"
    return f"at most {limit.at_most:,}, {limit.before:,} with all units{will_be}"


def _peak_rows(name: str, plan: PrunePlan | DevicePlan) -> list[tuple[str, str]]:
    """Format the planned peak of the host or the device, and the peaks of its phases."""
    from structprune.memory import format_bytes

    peak = f"{format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)} that the run may add"
    return [(name, peak), *((f"  {phase}", format_bytes(size)) for phase, size in plan.phases.items())]


def _as_dict(found: RunPlan) -> dict[str, Any]:
    memory = found.plan
    return {
        "model": found.source,
        "recipe": found.recipe.model_dump(mode="json"),
        "parameters_before": found.parameters_before,
        "parameters_around": found.layout.around.parameters,
        "parameters_after": found.forecast.num_parameters,
        "kept_units": found.forecast.kept,
        "zeros": None if found.forecast.zeros is None else asdict(found.forecast.zeros),
        "size": asdict(found.size),
        "limits": [
            {
                "name": limit.name,
                "at_most": limit.at_most,
                "before": limit.before,
                "predicted": None if found.forecast.kept is None else limit.predicted(found.forecast.kept),
            }
            for limit in found.forecast.limits
        ],
        "start_token": found.start,
        "notes": found.notes,
        "seconds": None if found.time is None else {"all": found.time.seconds, "stretches": dict(found.time.stretches)},
        "memory": {
            **_peak_dict(memory),
            "store": memory.store,
            "store_bytes": memory.store_bytes,
            "micro_batch_windows": memory.micro_batch_windows,
            "cached": list(memory.cached),
            "cache_bytes": memory.cache_bytes,
            "disk_bytes": memory.disk_bytes,
        },
        "device_memory": None
        if memory.device is None
        else {**_peak_dict(memory.device), "sums": memory.device.sums, "solves": memory.device.solves},
        "reload_check": {"mode": memory.reload_mode or "off", "planned_bytes": memory.reload_bytes},
        "runtimes": [asdict(runtime) for runtime in found.runtimes],
    }


def _peak_dict(plan: PrunePlan | DevicePlan) -> dict[str, Any]:
    from structprune.phases import by_name

    return {"budget_bytes": plan.budget_bytes, "planned_peak_bytes": plan.peak_bytes, "phases": by_name(plan.phases)}
