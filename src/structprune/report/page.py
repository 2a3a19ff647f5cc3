"""The HTML page of a run: one file, no network, no script. Every value goes through the template's escaping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from structprune.kinds import SCOPES
from structprune.memory import format_bytes
from structprune.report.figures import (
    Chart,
    fit_charts,
    gate_charts,
    memory_charts,
    objective_charts,
    retention_charts,
    search_charts,
    short,
)
from structprune.results.measured import Bench, Evaluation
from structprune.results.memory import DeviceMemoryReport, MemoryReport
from structprune.results.removed import asked
from structprune.results.report import PruneReport
from structprune.results.summary import bits_rows, gate_rows, reload_line, repair_rows, stored_in, warnings
from structprune.texts import shown_texts

PAGE_NAME = "pruning_report.html"

# Settings that say nothing of the result.
_LEFT_OUT = (
    *("memory", "device_memory", "max_shard_size", "reload_check", "latency_table"),
    # What the run went by is the list.
    *("vocabulary", "vocabulary_text", "drop_reserve"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    label: str
    value: str
    more: str


def prune_page(report: PruneReport, measured: Sequence[Evaluation | Bench] = ()) -> str:
    """Render the page of a report, with what was measured on its result since."""
    name, source = Path(report.output).name, Path(report.source).name
    return render(
        "prune.html",
        title=f"{name}: pruning report",
        name=name,
        lead=f"{source}, pruned by {report.method}: {_removed(report)}, "
        f"{'' if report.adapter is None else f'adapter {Path(report.adapter.path).name} merged, '}calibrated on "
        f"{report.calibration.description}.",
        tiles=_tiles(report),
        warnings=warnings(report),
        before_after=_before_after(report, measured),
        notes=_notes(measured),
        blocks=drawable([*retention_charts(report), *fit_charts(report)]),
        gates=drawable(gate_charts(report)),
        objectives=drawable(objective_charts(report)),
        search=drawable(search_charts(report)),
        searched=[] if report.search is None else [f"Search: {report.search.line}."],
        memory=drawable(memory_charts(report)),
        phases=_phase_rows(report),
        phases_note=_phases_note(report),
        runtimes=[
            (runtime.runtime, runtime.loads + (f", {runtime.basis}" if runtime.basis else ""), runtime.reason)
            for runtime in report.runtimes
        ],
        limits=[
            *([] if report.vocabulary is None else [f"Vocabulary: {report.vocabulary.line}."]),
            *(f"{name[0].upper()}{name[1:]}: {value}." for name, value in bits_rows(report)),
            *(f"Limit of {limit.name}: {limit.line}." for limit in report.limits),
        ],
        repair=[f"{name[0].upper()}{name[1:]}: {value}." for name, value in (*gate_rows(report), *repair_rows(report))],
        reload=f"Reload check: {reload_line(report.reload)}.",
        recipe=_recipe_rows(report),
        block_head=("block", "kind", "kept", "of", "error, cut", "error, solved", "status", "seconds"),
        block_rows=_block_rows(report),
        footer=_footer(report),
    )


def render(template: str, **values: Any) -> str:
    """Fill a template of this package. A name that is missing is a bug of ours and raises."""
    return _environment().get_template(template).render(values) + "\n"


@cache
def _environment() -> Environment:
    """Return what keeps the compiled templates."""
    return Environment(
        loader=PackageLoader("structprune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def drawable(charts: Sequence[Chart]) -> list[Chart]:
    """Mark the charts' drawings as safe markup: `svg.py` has escaped what is in them."""
    return [replace(chart, svg=Markup(chart.svg)) for chart in charts]


def _scope(report: PruneReport) -> str:
    return {"mlp": "the MLPs", "attention": "the attention", "all": "the blocks"}[report.recipe.scope]


def _tiles(report: PruneReport) -> list[_Tile]:
    size, memory = report.size, report.memory
    return [
        _perplexity_tile(report),
        _Tile(
            label="parameters",
            value=f"{-size.removed_share_of_model:+.1%}",
            more=f"{size.parameters_before / 1e6:,.1f}M to {size.parameters_after / 1e6:,.1f}M",
        ),
        _Tile(
            label="on disk",
            value=f"{size.bytes_after / size.bytes_before - 1:+.1%}",
            more=f"{format_bytes(size.bytes_before)} to {format_bytes(size.bytes_after)}{stored_in(size)}",
        ),
        _Tile(
            label="peak memory",
            value=format_bytes(memory.measured_peak_bytes),
            more=f"planned {format_bytes(memory.planned_peak_bytes)}",
        ),
        _Tile(
            label="wall time",
            value=_duration(report.wall_seconds),
            more=f"{report.compute_dtype} on {report.device}",
        ),
    ]


def _perplexity_tile(report: PruneReport) -> _Tile:
    held_out, text = report.held_out, report.calibration
    if held_out is None:
        return _Tile(
            label="perplexity, in-sample only",
            value=f"{text.pruned_perplexity:.2f}",
            more=f"dense {text.dense_perplexity:.2f}; {text.perplexity_windows} x {text.seq_len} tokens",
        )
    return _Tile(
        label="perplexity, held-out windows",
        value=f"{held_out.pruned_perplexity:.2f}",
        more=f"dense {held_out.dense_perplexity:.2f}; in-sample {text.dense_perplexity:.2f} to "
        f"{text.pruned_perplexity:.2f}",
    )


def _before_after(report: PruneReport, measured: Sequence[Evaluation | Bench]) -> list[tuple[str, str, str, str]]:
    size, text, held_out = report.size, report.calibration, report.held_out
    rows = [
        *(
            _compared(name, one.dense_perplexity, one.pruned_perplexity, "{:.2f}")
            for name, one in (("perplexity of held-out windows", held_out), ("perplexity, in-sample", text))
            if one is not None
        ),
        *(
            _compared(f"perplexity, {one.label}", one.dense_perplexity, one.pruned_perplexity, "{:.2f}")
            for one in (held_out.texts if held_out is not None else ())
        ),
        _compared("parameters", size.parameters_before, size.parameters_after, "{:,.0f}"),
        *(
            []
            if report.zeros is None
            else [_compared("of them not zero", size.parameters_before, report.zeros.nonzero_parameters, "{:,.0f}")]
        ),
        (
            "weight files",
            format_bytes(size.bytes_before),
            format_bytes(size.bytes_after),
            f"{size.bytes_after / size.bytes_before - 1:+.1%}",
        ),
    ]
    for result in measured:
        rows += _evaluated(result) if isinstance(result, Evaluation) else _benched(result)
    return rows


def _evaluated(result: Evaluation) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    for text in result.texts:
        name = f"perplexity of {Path(text.text).name}, {text.num_windows} x {text.seq_len} tokens"
        if text.reference_perplexity is None:
            rows.append((name, "", f"{text.perplexity:.2f}", ""))
            continue
        rows.append(_compared(name, text.reference_perplexity, text.perplexity, "{:.2f}"))
        rows.append((f"KL from the dense model, {Path(text.text).name}", "", f"{text.kl_to_reference:.3f} nats", ""))
        rows.append((f"same likeliest token, {Path(text.text).name}", "", f"{text.top1_agreement:.1%}", ""))
    for task in result.tasks:
        for metric, value in task.metrics.items():
            error = task.standard_errors.get(metric)
            shown = f"{value:.3f}" + (f" +- {error:.3f}" if error else "")
            rows.append((f"{task.task}, {metric} ({task.num_samples} samples)", "", shown, ""))
    return rows


def _benched(result: Bench) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    own, other = result.models[0], result.models[1] if len(result.models) > 1 else None
    for index, point in enumerate(own.points):
        shape = f"batch {point.batch}, prompt of {point.prompt_tokens}"
        for name, rate, ratio in (
            ("prefill", point.prefill, point.prefill_ratio),
            ("decode", point.decode, point.decode_ratio),
        ):
            before = "" if other is None else f"{getattr(other.points[index], name).median:,.1f}"
            change = "" if ratio is None else f"{ratio:.2f}x"
            rows.append((f"{name}, tokens/s, {shape}", before, f"{rate.median:,.1f}", change))
    return rows


def _compared(name: str, before: float, after: float, form: str) -> tuple[str, str, str, str]:
    return name, form.format(before), form.format(after), f"{after / before - 1:+.1%}"


def _notes(measured: Sequence[Evaluation | Bench]) -> list[str]:
    """Describe how the added rows were measured."""
    notes: list[str] = []
    for result in measured:
        if isinstance(result, Bench):
            notes.append(
                f"Speed: median of {result.repeats} runs after a warm-up, models in turn, {result.dtype} on "
                f"{result.device}; {result.machine}."
            )
        elif result.task_limit is not None:
            notes.append(f"Tasks: only the first {result.task_limit} samples of each.")
    return notes


def _removed(report: PruneReport) -> str:
    """Say in a clause what went."""
    if report.zeros is not None:
        return f"{report.zeros.share:.2%} zeros in the matrices of {_scope(report)}, pattern {report.zeros.pattern}"
    if not SCOPES[report.recipe.scope]:
        return "tokens alone removed"
    share = report.size.removed_share_of_scope
    return f"{share:.2%} of the parameters of {_scope(report)} removed ({asked(report)})"


def _recipe_rows(report: PruneReport) -> list[tuple[str, str]]:
    recipe = report.recipe.model_dump(mode="json", exclude=set(_LEFT_OUT))
    recipe |= {
        "calibration": shown_texts(report.recipe.calibration),
        "merge_adapter": Path(recipe["merge_adapter"]).name,
    }
    return [(name.replace("_", " "), str(value)) for name, value in recipe.items() if value is not None]


def _phase_rows(report: PruneReport) -> list[tuple[str, str, str]]:
    """List (phase, planned peak, share of the largest in percent), the largest first."""
    largest = report.memory.planned_peak_bytes
    phases = sorted(report.memory.phases.items(), key=lambda item: -item[1])
    return [(name, format_bytes(size), f"{100 * size / largest:.1f}") for name, size in phases]


def _phases_note(report: PruneReport) -> str:
    memory = report.memory
    where = "in memory" if memory.store == "memory" else "in a file"
    return (
        f"Measured in all: {format_bytes(memory.measured_peak_bytes)}. Budget {format_bytes(memory.budget_bytes)}; "
        f"hidden states {where}, {memory.micro_batch_windows} windows at a time."
        f"{_cache_note(memory)}{_device_note(memory.device)}"
    )


def _cache_note(memory: MemoryReport) -> str:
    if not memory.cached:
        return ""
    return f" Activations kept for {' and '.join(memory.cached)}: {format_bytes(memory.cache_bytes)}."


def _device_note(device: DeviceMemoryReport | None) -> str:
    if device is None:
        return ""
    return (
        f" On the device: measured {format_bytes(device.measured_peak_bytes)}, planned "
        f"{format_bytes(device.planned_peak_bytes)}, budget {format_bytes(device.budget_bytes)}."
    )


def _block_rows(report: PruneReport) -> list[tuple[str, ...]]:
    return [
        (
            str(block.block),
            block.kind,
            f"{block.kept_units:,}",
            f"{block.num_units:,}",
            "" if block.error_mask_only is None else short(block.error_mask_only),
            "" if block.error is None else short(block.error),
            block.status,
            f"{block.seconds:.1f}",
        )
        for block in report.blocks
    ]


def _footer(report: PruneReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        f"Report schema {report.schema_version}. {versions}. Source fingerprint {report.source_fingerprint[:16]}, "
        f"calibration fingerprint {report.calibration.fingerprint[:16]}."
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
