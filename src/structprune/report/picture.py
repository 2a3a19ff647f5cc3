"""A picture of models side by side: one SVG file that stands alone, in a README for example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

from structprune.files import write_text
from structprune.report.figures import Chart, retention_charts
from structprune.report.svg import Axis, column_chart, standalone
from structprune.results.report import PruneReport
from structprune.results.side_by_side import ModelColumn


def write_picture(path: Path, title: str, columns: Sequence[ModelColumn], report: PruneReport) -> None:
    """Draw parameters and perplexities of `columns`, and the widths of `report`, into the file `path`."""
    charts = [
        _columns("Parameters, millions", columns, lambda one: one.parameters / 1e6),
        *(_perplexity(text, columns) for text in columns[0].perplexities),
        *retention_charts(report),
    ]
    style = resources.files("structprune.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    write_text(path, standalone(title, [(chart.title, chart.svg) for chart in charts], style))


def _perplexity(text: str, columns: Sequence[ModelColumn]) -> Chart:
    return _columns(f"Perplexity, {text}", columns, lambda one: one.perplexities[text])


def _columns(title: str, columns: Sequence[ModelColumn], value: Callable[[ModelColumn], float]) -> Chart:
    """Draw one column per model; its name says the value too, because a picture has no tool tips."""
    values: list[tuple[str, float | None]] = [(f"{one.name} {value(one):.1f}", value(one)) for one in columns]
    return Chart(title=title, svg=column_chart(title, values, "", Axis(label="", format="{:g}".format)))
