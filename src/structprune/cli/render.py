"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from structprune.exporters.runtimes import RuntimeSupport
from structprune.memory import format_bytes
from structprune.report.comparison import Comparison
from structprune.report.schema import PruneReport, ReloadReport, RuntimeReport


def key_value_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print two columns without a header."""
    # Text, not str: names and paths may hold brackets, which rich would read as markup.
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console().print(table)


def report_table(report: PruneReport) -> None:
    """Print what a run did and cost."""
    size, memory, calibration = report.size, report.memory, report.calibration
    saved = 1 - size.bytes_after / size.bytes_before
    key_value_table(
        f"{report.method}: {report.source} -> {report.output}",
        [
            (
                f"removed of {report.recipe.scope}",
                f"{size.removed_share_of_scope:.2%} of its parameters (asked {report.recipe.sparsity:.2%})",
            ),
            ("removed of the blocks", f"{size.removed_share_of_blocks:.2%}"),
            ("removed of the model", f"{size.removed_share_of_model:.2%}"),
            ("parameters", f"{size.parameters_before:,} -> {size.parameters_after:,}"),
            (
                "bytes on disk",
                f"{format_bytes(size.bytes_before)} -> {format_bytes(size.bytes_after)} ({saved:.1%} less)",
            ),
            (
                "calibration",
                f"{calibration.description}: {calibration.num_windows} windows of {calibration.seq_len} tokens",
            ),
            (
                "perplexity of that text",
                f"{calibration.dense_perplexity:.2f} -> {calibration.pruned_perplexity:.2f} "
                f"(first {calibration.perplexity_windows} windows, in-sample; use `structprune eval` for unseen text)",
            ),
            (
                "peak memory",
                f"planned {format_bytes(memory.planned_peak_bytes)}, "
                f"measured {format_bytes(memory.measured_peak_bytes)}",
            ),
            ("reload check", reload_line(report.reload)),
            ("forward passes", f"{report.compute_dtype} on {report.device}"),
            ("wall time", f"{report.wall_seconds:.1f} s"),
            *runtime_rows(report.runtimes),
        ],
    )


def runtime_rows(supports: Iterable[RuntimeSupport | RuntimeReport]) -> list[tuple[str, str]]:
    """Who loads a checkpoint, how that is known, and how or why not."""
    return [(s.runtime, f"{s.loads}{f' ({s.basis})' if s.basis else ''}: {s.reason}") for s in supports]


def reload_line(reload: ReloadReport) -> str:
    """How the reload check went, on one line."""
    if reload.relative_difference is None:
        return f"{'left out' if reload.mode == 'off' else 'not possible'} ({reload.reason})"
    how = "whole model" if reload.mode == "whole" else f"module by module, because {reload.reason}"
    return (
        f"stock transformers, {how}: relative difference {reload.relative_difference:.1e} of the logits at "
        f"{reload.num_positions} positions ({reload.seconds:.1f} s)"
    )


def comparison_table(result: Comparison) -> None:
    """Print what is left of the model's quality, then what it took; best first within each sparsity."""
    windows = "all windows" if result.max_windows is None else f"first {result.max_windows} windows"
    quality = Table(
        title=Text(
            f"{result.model}, calibrated on {result.calibration}: perplexity over {windows} of "
            f"{result.seq_len} tokens, KL from the dense model in nats per token"
        ),
        title_justify="left",
    )
    cost = Table(title="What it took; wall time counts shared measurements in full", title_justify="left")
    for table in (quality, cost):
        table.add_column("asked", no_wrap=True)
        table.add_column("method", overflow="fold")
    for name in ("params", "disk"):
        quality.add_column(name, justify="right", no_wrap=True)
    for text in result.texts:
        quality.add_column(Text(text.label), justify="right", overflow="fold")
        quality.add_column("KL", justify="right", no_wrap=True)
    for name in ("wall", "shared", "peak", "planned", "prefill", "decode"):
        cost.add_column(name, justify="right", no_wrap=True)
    if result.dense is not None:
        scores = [value for score in result.dense.texts for value in (f"{score.perplexity:.2f}", "")]
        quality.add_row("", "dense", _millions(result.dense.parameters), format_bytes(result.dense.bytes), *scores)
    previous: str | None = None
    for cell in result.ordered():
        asked = f"{cell.sparsity:.4g} {cell.scope}"
        if f"{cell.sparsity}" != previous:
            quality.add_section()
            cost.add_section()
        previous = f"{cell.sparsity}"
        scores = [
            value
            for score in cell.texts
            for value in (f"{score.perplexity:.2f}", "" if score.kl_to_dense is None else f"{score.kl_to_dense:.3f}")
        ]
        quality.add_row(asked, Text(cell.label), _millions(cell.parameters), format_bytes(cell.bytes), *scores)
        speed = cell.speed
        cost.add_row(
            asked,
            Text(cell.label),
            f"{cell.wall_seconds:.0f} s",
            f"{cell.shared_seconds:.0f} s" if cell.shared_seconds else "",
            format_bytes(cell.measured_peak_bytes),
            format_bytes(cell.planned_peak_bytes),
            "" if speed is None else f"{speed.prefill_speedup:.2f}x",
            "" if speed is None else f"{speed.decode_speedup:.2f}x",
        )
    console = Console()
    console.print(quality)
    console.print(cost)


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f}M"
