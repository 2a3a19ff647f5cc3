"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from structprune.memory import format_bytes
from structprune.report.schema import PruneReport


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
            ("forward passes", f"{report.compute_dtype} on {report.device}"),
            ("wall time", f"{report.wall_seconds:.1f} s"),
        ],
    )
