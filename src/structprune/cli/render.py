"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from structprune.cli.tables import Column, Heading, Row, fits, print_pairs, print_table
from structprune.exporters.runtimes import RuntimeSupport
from structprune.memory import format_bytes
from structprune.recipe.latency import LatencyTable
from structprune.results.comparison import COST_COLUMNS, Cell, Comparison, TextScore, cost_values
from structprune.results.measured import Bench, Rate
from structprune.results.report import PruneReport
from structprune.results.schema import RuntimeReport
from structprune.results.summary import summary_rows, warnings


def report_table(report: PruneReport) -> None:
    """Print what a run did and cost."""
    rows = [*summary_rows(report), *runtime_rows(report.runtimes)]
    print_pairs(report.title, rows)
    for warning in warnings(report):
        Console(stderr=True).print(Text(warning))


def runtime_rows(supports: Iterable[RuntimeSupport | RuntimeReport]) -> list[tuple[str, str]]:
    """Format which runtimes load a checkpoint, how that is known, and how they load it or why they do not."""
    return [(s.runtime, f"{s.loads}{f' ({s.basis})' if s.basis else ''}: {s.reason}") for s in supports]


def comparison_table(result: Comparison) -> None:
    """Print what is left of the model's quality, then what it took; best first within each sparsity."""
    windows = "all windows" if result.max_windows is None else f"first {result.max_windows} windows"
    title = (
        f"{result.model}, calibrated on {result.calibration}: perplexity over {windows} of {result.seq_len} tokens, "
        "KL from the dense model in nats per token"
    )
    numbers = range(len(result.texts))
    names = [text.label for text in result.texts]
    if fits(_quality_columns(result, names), _quality_rows(result, numbers)):
        print_table(title, _quality_columns(result, names), _quality_rows(result, numbers))
    else:
        legend = [f"text {number + 1}: {name}" for number, name in enumerate(names)]
        for part in _parts(result, numbers):
            headers = [f"text {number + 1}" for number in part]
            print_table(title, _quality_columns(result, headers), _quality_rows(result, part), legend=legend)
            title, legend = "", []
    print_table(
        "What it took; wall time counts shared measurements in full",
        [Column(name="method"), *(Column(name=name, figures=True) for name in COST_COLUMNS)],
        _by_sparsity(result, lambda cell: [cell.label, *cost_values(cell)]),
    )


def _parts(result: Comparison, numbers: Sequence[int]) -> list[Sequence[int]]:
    """Share the texts out to tables, as many to each as the terminal is wide enough for."""
    size = len(numbers)
    while size > 1 and not fits(
        _quality_columns(result, [f"text {number + 1}" for number in numbers[:size]]),
        _quality_rows(result, numbers[:size]),
    ):
        size -= 1
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def _quality_columns(result: Comparison, texts: Sequence[str]) -> list[Column]:
    # Where single weights went, parameters are as many as before.
    # Where tokens went perplexities do not compare, and their divergence means nothing.
    beside = "bits/byte" if result.has_fewer_tokens else "KL"
    figures = [
        "not zero" if result.has_zeros else "params",
        "disk",
        *(name for text in texts for name in (text, beside)),
    ]
    return [Column(name="method"), *(Column(name=name, figures=True) for name in figures)]


def _quality_rows(result: Comparison, texts: Sequence[int]) -> list[Row]:
    """Collect a row per model with its scores on some of the texts, the dense one first."""

    def row(label: str, parameters: int, size: int, scores: Sequence[TextScore]) -> list[str]:
        figures = [value for number in texts for value in _score(scores[number], result)]
        return [label, _millions(parameters), format_bytes(size), *figures]

    dense = result.dense
    first = [] if dense is None else [row("dense", dense.parameters, dense.bytes, dense.texts)]
    return [*first, *_by_sparsity(result, lambda cell: row(cell.label, cell.nonzero, cell.bytes, cell.texts))]


def _score(score: TextScore, result: Comparison) -> tuple[str, str]:
    beside = (score.bits_per_byte, 4) if result.has_fewer_tokens else (score.kl_to_dense, 3)
    return f"{score.perplexity:.2f}", "" if beside[0] is None else f"{beside[0]:.{beside[1]}f}"


def _by_sparsity(result: Comparison, row: Callable[[Cell], list[str]]) -> list[Row]:
    """Collect a row per cell, under a heading for each share and scope."""
    rows: list[Row] = []
    previous: Heading | None = None
    for cell in result.ordered():
        heading = Heading(f"{cell.asked} {cell.scope}")
        if heading != previous:
            rows.append(heading)
        previous = heading
        rows.append(row(cell))
    return rows


def bench_tables(result: Bench) -> None:
    """Print sizes of the models, then every point of the grid."""
    print_table(
        f"structprune bench, {result.dtype} on {result.device}",
        [
            Column(name="model"),
            *(Column(name=name, figures=True) for name in ("params", "disk", "weights in memory")),
        ],
        [
            (m.model, _millions(m.parameters), format_bytes(m.file_bytes), format_bytes(m.weight_bytes))
            for m in result.models
        ],
    )
    ratios = ("prefill ratio", "decode ratio") if len(result.models) > 1 else ()
    print_table(
        f"Tokens per second: median of {result.repeats} runs after a warm-up (lower to upper quartile)",
        [Column(name="model"), *(Column(name=name, figures=name in ratios) for name in (*_POINT_COLUMNS, *ratios))],
        _point_rows(result),
    )


def latency_table(table: LatencyTable, path: Path) -> None:
    """Print what each width takes, and where the table is."""
    print_table(
        f"Times on {table.device}, {table.dtype}, batch {table.batch}, prompt {table.prompt_tokens}: "
        f"prefill {table.prefill / 1e3:,.1f} ms, decode {table.decode / 1e3:,.2f} ms a token",
        [Column(name="units"), *(Column(name=name, figures=True) for name in ("prefill ms", "decode ms"))],
        [
            row
            for times in table.sublayers
            for row in (
                Heading(f"{times.kind} of {times.num_units} units, one block"),
                *(
                    (str(units), f"{prefill / 1e3:,.3f}", f"{decode / 1e3:,.3f}")
                    for units, prefill, decode in zip(times.units, times.prefill, times.decode, strict=True)
                ),
            )
        ],
    )
    print(f"written to {path}: structprune prune MODEL -o OUT --target-latency 0.75x --latency-table {path}")


_POINT_COLUMNS = ("prefill", "decode", "peak memory")


def _point_rows(result: Bench) -> list[Row]:
    """Collect a row per model, under a heading for each point of the grid."""
    rows: list[Row] = []
    for points in zip(*(model.points for model in result.models), strict=True):
        rows.append(Heading(f"batch {points[0].batch}, prompt {points[0].prompt_tokens}"))
        for model, point in zip(result.models, points, strict=True):
            ratios = (point.prefill_ratio, point.decode_ratio) if len(result.models) > 1 else ()
            figures = [_rate(point.prefill), _rate(point.decode), format_bytes(point.peak_bytes)]
            rows.append([model.model, *figures, *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)])
    return rows


def _rate(rate: Rate) -> str:
    return f"{rate.median:,.1f} ({rate.low:,.1f} to {rate.high:,.1f})"


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f}M"
