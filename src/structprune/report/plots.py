"""Curves of a comparison, and charts of a report, as PNG files. Needs matplotlib (the `report` extra)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from structprune.errors import InputError
from structprune.files import atomic_path
from structprune.recipe import Recipe
from structprune.results.comparison import Cell, Comparison
from structprune.results.report import PruneReport


def check_matplotlib() -> None:
    """Raise InputError if there is nothing to draw with."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise InputError(
            "matplotlib is not installed, so there are no curves",
            do="pip install 'structprune[report]', or use --no-plots",
        ) from None


def plot_comparison(comparison: Comparison, directory: Path) -> list[Path]:
    """Plot perplexity against parameters kept, and against wall time; one panel per text. Returns the files."""
    return [
        _curves(
            comparison,
            directory / "perplexity-parameters.png",
            "parameters kept, millions",
            lambda cell: cell.nonzero / 1e6,
            dense=True,
        ),
        _curves(
            comparison,
            directory / "perplexity-seconds.png",
            "wall time of pruning, seconds",
            lambda cell: cell.wall_seconds,
            dense=False,
        ),
    ]


def plot_report(report: PruneReport, directory: Path) -> list[Path]:
    """Plot each block's retention and error by kind, and memory over time, side by side in one file. Returns it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Where tokens alone went, memory is left to be drawn.
    kinds = list(dict.fromkeys(block.kind for block in report.blocks)) or ["no units"]
    figure = Figure(figsize=(15, 4.2 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(kinds), 3, squeeze=False)
    for (retention, error, memory), kind in zip(rows, kinds, strict=True):
        blocks = [block for block in report.blocks if block.kind == kind]
        numbers = [block.block for block in blocks]
        retention.bar(numbers, [block.kept_units / block.num_units for block in blocks])
        retention.set(title=f"kept, {kind}", xlabel="block", ylabel="share of the units", ylim=(0, 1))
        for label, values in (
            ("cut weight", [block.error_mask_only for block in blocks]),
            ("after the solver", [block.error for block in blocks]),
        ):
            points = [(number, value) for number, value in zip(numbers, values, strict=True) if value is not None]
            if points:
                error.plot(*zip(*points, strict=True), marker=".", label=label)
                error.legend(fontsize="small")
        error.set(title=f"relative squared error, {kind}", xlabel="block")
        timeline = report.memory.timeline
        memory.plot([stretch.seconds for stretch in timeline], [stretch.peak_bytes / 2**20 for stretch in timeline])
        memory.axhline(report.memory.planned_peak_bytes / 2**20, color="black", linestyle="--", label="planned")
        memory.set(title="peak memory of each stretch", xlabel="seconds", ylabel="MiB", ylim=(0, None))
        memory.legend(fontsize="small")
    figure.suptitle(f"{Path(report.source).name}, {report.method}: {report.size.removed_share_of_model:.1%} removed")
    path = directory / "pruning_report.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return [path]


def _curves(
    comparison: Comparison, path: Path, axis_label: str, position: Callable[[Cell], float], *, dense: bool
) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    num_texts = len(comparison.texts)
    figure = Figure(figsize=(6.4 * num_texts, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, num_texts, squeeze=False)[0]
    labels = list(dict.fromkeys(cell.label for cell in comparison.cells))
    # The method that a recipe has by default.
    emphasised = Recipe().method
    for index, (panel, text) in enumerate(zip(panels, comparison.texts, strict=True)):
        for label in labels:
            # At each sparsity once: the line of a method goes from its smallest share to its largest.
            points = sorted((c for c in comparison.cells if c.label == label), key=lambda c: c.sparsity)
            panel.plot(
                [position(cell) for cell in points],
                [comparison.quality(cell.texts[index]) for cell in points],
                marker="o" if label == emphasised else ".",
                linewidth=2.2 if label == emphasised else 1.2,
                label=label,
            )
        if dense and comparison.dense is not None:
            score = comparison.quality(comparison.dense.texts[index])
            panel.plot(comparison.dense.parameters / 1e6, score, "k*", markersize=11, label="dense")
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter() if _decades(panel.get_ylim()) > 1 else ScalarFormatter())
        panel.set_xlabel(axis_label)
        measure = "bits per byte" if comparison.has_fewer_tokens else "perplexity"
        panel.set_ylabel(f"{measure}, windows of {comparison.seq_len} tokens")
        panel.set_title(text.label)
        panel.grid(visible=True, which="both", alpha=0.3)
    panels[-1].legend(fontsize="small")
    figure.suptitle(f"{comparison.model}, calibrated on {comparison.calibration}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def _decades(limits: tuple[float, float]) -> float:
    from math import log10

    return log10(limits[1] / limits[0])
