"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from structprune.exporters.runtimes import RuntimeSupport
from structprune.memory import format_bytes
from structprune.results.comparison import COST_COLUMNS, Comparison, cost_values
from structprune.results.measured import Bench, Rate
from structprune.results.report import PruneReport
from structprune.results.schema import RuntimeReport
from structprune.results.summary import rich_table, summary_rows, warnings


def key_value_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print two columns without a header."""
    Console().print(rich_table(title, rows))


def report_table(report: PruneReport) -> None:
    """Print what a run did and cost."""
    rows = [*summary_rows(report), *runtime_rows(report.runtimes)]
    key_value_table(f"{report.method}: {report.source} -> {report.output}", rows)
    for warning in warnings(report):
        Console(stderr=True).print(Text(warning))


def runtime_rows(supports: Iterable[RuntimeSupport | RuntimeReport]) -> list[tuple[str, str]]:
    """Who loads a checkpoint, how that is known, and how or why not."""
    return [(s.runtime, f"{s.loads}{f' ({s.basis})' if s.basis else ''}: {s.reason}") for s in supports]


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
    for name in COST_COLUMNS:
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
        cost.add_row(asked, Text(cell.label), *cost_values(cell))
    console = Console()
    console.print(quality)
    console.print(cost)


def bench_tables(result: Bench) -> None:
    """Print sizes of the models, then every point of the grid."""
    sizes = Table(title=Text(f"structprune bench, {result.dtype} on {result.device}"), title_justify="left")
    sizes.add_column("model", overflow="fold")
    for name in ("params", "disk", "weights in memory"):
        sizes.add_column(name, justify="right", no_wrap=True)
    points = Table(
        title=Text(f"Tokens per second: median of {result.repeats} runs after a warm-up (lower to upper quartile)"),
        title_justify="left",
    )
    compared = len(result.models) > 1
    points.add_column("batch", justify="right", no_wrap=True)
    points.add_column("prompt", justify="right", no_wrap=True)
    points.add_column("model", overflow="fold")
    for name in ("prefill", "decode", "peak memory", *(("prefill ratio", "decode ratio") if compared else ())):
        points.add_column(name, justify="right")
    for model in result.models:
        sizes.add_row(
            Text(model.model),
            _millions(model.parameters),
            format_bytes(model.file_bytes),
            format_bytes(model.weight_bytes),
        )
    for row in zip(*(model.points for model in result.models), strict=True):
        points.add_section()
        for model, point in zip(result.models, row, strict=True):
            ratios = (point.prefill_ratio, point.decode_ratio) if compared else ()
            points.add_row(
                f"{point.batch}",
                f"{point.prompt_tokens}",
                Text(model.model),
                _rate(point.prefill),
                _rate(point.decode),
                format_bytes(point.peak_bytes),
                *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            )
    console = Console()
    console.print(sizes)
    console.print(points)


def _rate(rate: Rate) -> str:
    return f"{rate.median:,.1f} ({rate.low:,.1f} to {rate.high:,.1f})"


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f}M"
