"""The HTML page of a comparison: its table, and perplexity against what it took."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from structprune.memory import format_bytes
from structprune.report.figures import Chart, short
from structprune.report.page import drawable, render
from structprune.report.svg import Axis, Level, Series, line_chart
from structprune.results.comparison import COST_COLUMNS, Cell, Comparison, TextScore, cost_values

COMPARISON_PAGE_NAME = "comparison.html"

# Beyond this many times the dense model's perplexity nothing is left of the model, and curves would hide the rest.
_DRAWN_UP_TO = 20.0
_NUM_COLOURS = 8


def comparison_page(comparison: Comparison) -> str:
    """Render the page of a comparison, also of one that is not finished."""
    windows = "all windows" if comparison.max_windows is None else f"the first {comparison.max_windows} windows"
    return render(
        "comparison.html",
        title=f"{comparison.model}: comparison of methods",
        name=f"{comparison.model}: methods compared",
        lead=f"Calibrated on {comparison.calibration}; perplexity over {windows} of {comparison.seq_len} tokens; "
        f"{comparison.dtype} on {comparison.device}.",
        warnings=[*_failures(comparison), *_other_tokens(comparison)],
        curves=drawable(_curves(comparison)),
        quality_head=_quality_head(comparison),
        quality=_quality(comparison),
        cost_head=("asked", "method", *COST_COLUMNS),
        cost=[(_asked(comparison, cell), cell.label, *cost_values(cell)) for cell in comparison.ordered()],
        footer=_footer(comparison),
    )


def _failures(comparison: Comparison) -> list[str]:
    """List the failures, one line per method and reason."""
    shares: dict[tuple[str, str], list[str]] = {}
    for failure in sorted(comparison.failures, key=lambda failure: failure.sparsity or 0.0):
        given = shares.setdefault((failure.label, failure.error), [])
        given += [] if failure.sparsity is None else [f"{failure.sparsity:.4g}"]
    return [
        f"{label} failed{' at ' if given else ''}{', '.join(given)}: {error}"
        for (label, error), given in shares.items()
    ]


def _other_tokens(comparison: Comparison) -> list[str]:
    """Say that perplexities do not compare where tokens went in some cell."""
    if not comparison.has_fewer_tokens:
        return []
    return ["Models of fewer tokens are among these: perplexity is per token and does not compare, bits per byte do."]


def _asked(comparison: Comparison, cell: Cell) -> str:
    """Format the requested share of parameters, with its scope where the cells differ in that."""
    scopes = {other.scope for other in comparison.cells}
    return (cell.limits or f"{100 * cell.sparsity:.4g}%") + (f" {cell.scope}" if len(scopes) > 1 else "")


def _curves(comparison: Comparison) -> list[Chart]:
    charts: list[Chart] = []
    for index, text in enumerate(comparison.texts):
        charts.append(
            _curve(comparison, index, f"{text.label}, by size", "parameters kept, millions", _millions, log_x=False)
        )
    for index, text in enumerate(comparison.texts):
        charts.append(
            _curve(comparison, index, f"{text.label}, by time", "wall time of pruning, seconds", _seconds, log_x=True)
        )
    return charts


def _curve(
    comparison: Comparison, index: int, title: str, x_label: str, position: Callable[[Cell], float], *, log_x: bool
) -> Chart:
    dense = None if comparison.dense is None else comparison.quality(comparison.dense.texts[index])
    limit = float("inf") if dense is None else dense * _DRAWN_UP_TO
    measure = "bits per byte" if comparison.has_fewer_tokens else "perplexity"
    labels = list(dict.fromkeys(cell.label for cell in comparison.cells))
    series: list[Series] = []
    left_out: list[str] = []
    for label in labels:
        cells = sorted((cell for cell in comparison.cells if cell.label == label), key=lambda cell: cell.sparsity)
        drawn = [cell for cell in cells if comparison.quality(cell.texts[index]) <= limit]
        if len(drawn) < len(cells):
            left_out.append(label)
        if drawn:
            points = sorted((position(cell), comparison.quality(cell.texts[index])) for cell in drawn)
            dashes, colour = divmod(len(series), _NUM_COLOURS)
            style = f"s{colour + 1}{' dashed' if dashes else ''}"
            # In order of time the shares are not in order, so a line would mean nothing.
            series.append(Series(label=label, points=points, style=style, joined=not log_x))
    svg = line_chart(
        f"{measure} of {title}",
        series,
        Axis(label=x_label, format=short, log=log_x),
        # Room for the dense model's name below its line.
        Axis(label="", format=short, log=True, low=None if dense is None else dense * 0.75),
        [] if dense is None else [Level(value=dense, label=f"dense {dense:.2f}", side="left", below=True)],
    )
    caption = f"{measure[0].upper()}{measure[1:]}, logarithmic, windows of {comparison.seq_len} tokens."
    if left_out:
        caption += f" Not drawn above {limit:,.0f}: {', '.join(left_out)}."
    return Chart(title=title, svg=svg, caption=caption, legend=tuple((one.style, one.label) for one in series))


def _millions(cell: Cell) -> float:
    return cell.nonzero / 1e6


def _seconds(cell: Cell) -> float:
    return max(cell.wall_seconds, 0.1)


def _quality_head(comparison: Comparison) -> list[str]:
    head = ["asked", "method"]
    for text in comparison.texts:
        head += [text.label, *(["bits/byte"] if comparison.has_fewer_tokens else []), "KL"]
    return [*head, "parameters", *(["not zero"] if comparison.has_zeros else []), "on disk"]


def _quality(comparison: Comparison) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    if (dense := comparison.dense) is not None:
        scores = [
            value for score in dense.texts for value in (f"{score.perplexity:.2f}", *_bits(comparison, score), "")
        ]
        count = f"{dense.parameters / 1e6:.1f}M"
        rows.append(("", "dense", *scores, *[count] * (1 + comparison.has_zeros), format_bytes(dense.bytes)))
    for cell in comparison.ordered():
        scores = [
            value
            for score in cell.texts
            for value in (
                _perplexity(score.perplexity),
                *_bits(comparison, score),
                "" if score.kl_to_dense is None else f"{score.kl_to_dense:.3f}",
            )
        ]
        nonzero = [f"{_millions(cell):.1f}M"] if comparison.has_zeros else []
        size = (f"{cell.parameters / 1e6:.1f}M", *nonzero, format_bytes(cell.bytes))
        rows.append((_asked(comparison, cell), cell.label, *scores, *size))
    return rows


def _bits(comparison: Comparison, score: TextScore) -> list[str]:
    """Format the column that is there where tokens went in some cell."""
    if not comparison.has_fewer_tokens:
        return []
    return ["" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"]


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.1e}"


def _footer(comparison: Comparison) -> str:
    machines = "; ".join(dict.fromkeys(cell.machine for cell in comparison.cells))
    texts = ", ".join(f"{text.label} ({text.sha256[:8]})" for text in comparison.texts)
    return f"Comparison schema {comparison.schema_version}. Texts: {texts}. {machines}"
