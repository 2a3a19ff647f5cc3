"""The charts of a pruning report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from structprune.memory import format_bytes
from structprune.recipe.units import ResolvedUnits
from structprune.report.svg import Axis, Level, Series, column_chart, line_chart
from structprune.results.report import PruneReport
from structprune.results.schema import BlockReport
from structprune.results.search import SearchReport
from structprune.results.summary import UNITS, blocks_at_a_bound

_LOSS_MEAN = 10
PLACES = {"mlp": "MLP", "attention": "attention", "block": "whole block", "expert": "experts"}
"""Kind of a block report -> what it is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart and what stands around it."""

    title: str
    svg: str
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    """(class of the style sheet, name) of each series."""


def percent(value: float) -> str:
    """Format a share in percent, without decimals."""
    return f"{value:.0%}"


def short(value: float) -> str:
    """Format a number with three digits, and with a power of ten where it is far from one."""
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def retention_charts(report: PruneReport) -> list[Chart]:
    """Draw the share of its units that each block keeps, a chart per kind of unit."""
    low, high = blocks_at_a_bound(report)
    bounded = {(block.kind, block.block) for block in (*low, *high)}
    charts: list[Chart] = []
    for kind, blocks in _by_kind(report.blocks).items():
        sliced = blocks[0].status == "sliced"
        name = f"stream before {kind}" if sliced else UNITS.get(kind, kind)
        shares = [(str(block.block), block.kept_units / block.num_units) for block in blocks]
        kept, units = sum(block.kept_units for block in blocks), sum(block.num_units for block in blocks)
        marked = [place for place, block in enumerate(blocks) if (kind, block.block) in bounded]
        svg = column_chart(
            f"share of the {name} kept, by block",
            shares,
            "block",
            Axis(label="kept", format=percent, low=0.0, high=1.0),
            [Level(value=kept / units)] if 0 < kept < units else [],
            marked,
        )
        caption = f"{min(b.kept_units for b in blocks)} to {max(b.kept_units for b in blocks)} of "
        caption += f"{max(b.num_units for b in blocks)} in a block; {kept:,} of {units:,} in all (the line)."
        if marked:
            caption += " Orange: at a bound."
        charts.append(Chart(title=f"{name[0].upper()}{name[1:]} kept", svg=svg, caption=caption))
    return charts


def fit_charts(report: PruneReport) -> list[Chart]:
    """Draw each block's error, per kind of unit, and the statistics that make it large or small."""
    charts: list[Chart] = []
    for kind, blocks in _by_kind(report.blocks).items():
        if any(block.error is not None for block in blocks):
            charts.append(_error_chart(kind, blocks))
        for name, title, caption in (
            ("residual_energy", "Energy of the stream", "Mean squared length of a token before this sublayer's sum."),
            ("sensitivity", "Sensitivity of the loss", "Trace of the loss's curvature by this sublayer's output."),
        ):
            if any(name in block.statistics for block in blocks):
                charts.append(_by_block(f"{title}, {PLACES.get(kind, kind)}", blocks, name, caption))
    return charts


def _error_chart(kind: str, blocks: Sequence[BlockReport]) -> Chart:
    sliced = blocks[0].status == "sliced"
    series = [
        Series(
            label="cut weight", points=[(float(block.block), block.error_mask_only) for block in blocks], style="s2"
        ),
        Series(label="after the solver", points=[(float(block.block), block.error) for block in blocks]),
    ]
    series = [one for one in series if any(value is not None for _, value in one.points)]
    caption = "Squared error of the sublayer's output over the calibration tokens, relative to the wanted output."
    if sliced:
        caption = "Share of the stream's energy that the cut before the sublayer drops."
    values = [value for one in series for _, value in one.points if value]
    log = bool(values) and max(values) > 30 * min(values)
    if log and any(value == 0 for one in series for _, value in one.points):
        caption += " Logarithmic; zeros are not drawn."
    svg = line_chart(
        f"error by block, {kind}",
        series,
        Axis(label="block", format=_whole),
        Axis(label="", format=short, log=log, low=None if log else 0.0),
    )
    legend = tuple((one.style, one.label) for one in series) if len(series) > 1 else ()
    return Chart(title=f"Error, {PLACES.get(kind, kind)}", svg=svg, caption=caption, legend=legend)


def _by_block(title: str, blocks: Sequence[BlockReport], name: str, caption: str) -> Chart:
    """Draw one of the statistics by block."""
    series = Series(label="block", points=[(float(block.block), block.statistics.get(name)) for block in blocks])
    axis = Axis(label="", format=short, log=True)
    return Chart(
        title=title,
        svg=line_chart(f"{title}, by block", [series], Axis(label="block", format=_whole), axis),
        caption=f"{caption} Logarithmic.",
    )


def objective_charts(report: PruneReport) -> list[Chart]:
    """Draw the objective of an iterative solver, each block relative to its start, a chart per kind of unit."""
    charts: list[Chart] = []
    solver = report.recipe.solver if isinstance(report.recipe, ResolvedUnits) else "the solver"
    for kind, blocks in _by_kind(report.blocks).items():
        curves = [
            [value / block.objective[0] for value in block.objective]
            for block in blocks
            if len(block.objective) > 1 and block.objective[0] > 0
        ]
        if not curves:
            continue
        middle = [sorted(curve[step] for curve in curves if step < len(curve)) for step in range(max(map(len, curves)))]
        series = [Series(label="one block", points=_numbered(curve), style="faint", markers=False) for curve in curves]
        series.append(Series(label="median", points=_numbered([values[len(values) // 2] for values in middle])))
        svg = line_chart(
            f"objective of the solver by iteration, {kind}",
            series,
            Axis(label="iteration", format=_whole),
            Axis(label="", format=short),
        )
        charts.append(
            Chart(
                title=f"Objective of {solver}, {PLACES.get(kind, kind)}",
                svg=svg,
                caption="Of each block, over its value before the first iteration.",
                legend=(("s1", "median"), ("faint", "one block")),
            )
        )
    return charts


def gate_charts(report: PruneReport) -> list[Chart]:
    """Draw what gates learned: the loss by step, what changed by block, and the texts that only measured."""
    gates = report.gates
    if gates is None:
        return []
    losses = [(float(step), loss) for step, loss in enumerate(gates.losses, 1)]
    mean = [
        sum(gates.losses[max(0, i - _LOSS_MEAN) : i]) / len(gates.losses[max(0, i - _LOSS_MEAN) : i])
        for i in range(1, len(gates.losses) + 1)
    ]
    charts = [
        Chart(
            title=f"Loss by step, {gates.learner}",
            svg=line_chart(
                "loss of the gated model by step",
                [
                    Series(label="one window", points=losses, style="faint", markers=False),
                    Series(label="mean of the last ones", points=[(x + 1.0, y) for x, y in enumerate(mean)]),
                ],
                Axis(label="step", format=_whole),
                Axis(label="", format=short, low=0.0),
            ),
            caption="What the gates lower, in nats per token; windows differ among themselves.",
            legend=(("s1", f"mean of the last {_LOSS_MEAN}"), ("faint", "one window")),
        )
    ]
    by_kind: dict[str, list[tuple[str, float]]] = {}
    for sublayer in gates.sublayers:
        units = max(1, sublayer.num_free)
        by_kind.setdefault(sublayer.kind, []).append((str(sublayer.block), sublayer.came / units))
    for kind, shares in by_kind.items():
        name = UNITS.get(kind, kind)
        highest = max(share for _, share in shares)
        svg = column_chart(
            f"share of the free {name} that came, by block",
            shares,
            "block",
            Axis(label="came", format=percent, low=0.0, high=highest or 1.0),
            [],
            [],
        )
        free = sum(one.num_free for one in gates.sublayers if one.kind == kind)
        came = sum(one.came for one in gates.sublayers if one.kind == kind)
        caption = f"{came:,} stay that would have gone, of {free:,} that could change sides."
        charts.append(Chart(title=f"{name[0].upper()}{name[1:]} that changed places", svg=svg, caption=caption))
    return charts


def search_charts(report: PruneReport) -> list[Chart]:
    """Draw what a search has measured generation by generation, and the widths before and after it."""
    search = report.search
    if search is None:
        return []
    charts = [_generations_chart(search)] if search.generations else []
    charts += [_anchors_chart(search)] if search.anchors else []
    return [*charts, *_widths_charts(search)]


def _generations_chart(search: SearchReport) -> Chart:
    points = _numbered([1 + generation.change for generation in search.generations])
    svg = line_chart(
        "divergence of the best widths by generation, over that of the start",
        [Series(label="best so far", points=[(number + 1, value) for number, value in points])],
        Axis(label="generation", format=_whole),
        Axis(label="", format=short),
        [Level(value=1.0, label="start")],
    )
    caption = (
        "KL divergence from the dense model of the best widths so far over that of the start, each time on windows "
        "that were drawn for this generation alone."
    )
    return Chart(title="Best so far, by generation", svg=svg, caption=caption)


def _anchors_chart(search: SearchReport) -> Chart:
    """Draw by how much single sublayers lose more, or less, than was predicted."""
    kinds = list(dict.fromkeys(anchor.kind for anchor in search.anchors))
    series = [
        Series(
            label=PLACES.get(kind, kind),
            points=[
                (float(anchor.block), anchor.measured / anchor.predicted)
                for anchor in search.anchors
                if anchor.kind == kind and anchor.kept_units and anchor.predicted > 0
            ],
            style=f"s{number}",
        )
        for number, kind in enumerate(kinds, start=1)
    ]
    svg = line_chart(
        "measured over predicted loss of one width of each sublayer",
        series,
        Axis(label="block", format=_whole),
        Axis(label="", format=short, log=True),
        [Level(value=1.0, label="as predicted")],
    )
    return Chart(
        title="Measured over predicted loss",
        svg=svg,
        caption="The dense model with this sublayer alone at one width. Logarithmic.",
        legend=tuple((one.style, one.label) for one in series) if len(series) > 1 else (),
    )


def _widths_charts(search: SearchReport) -> list[Chart]:
    """Draw the widths before and after, a chart per kind of unit."""
    charts: list[Chart] = []
    for kind, before in search.start_widths.items():
        after = search.found_widths[kind]
        series = [
            Series(label="start", points=_numbered(before), style="s2"),
            Series(label="found", points=_numbered(after)),
        ]
        name = UNITS.get(kind, kind)
        charts.append(
            Chart(
                title=f"{name[0].upper()}{name[1:]} before and after",
                svg=line_chart(
                    f"{name} kept by block, before and after the search",
                    series,
                    Axis(label="block", format=_whole),
                    Axis(label="", format=_whole, low=0.0),
                ),
                caption="What the search began with, and the best that it found"
                + ("." if search.taken else ", which was not taken."),
                legend=tuple((one.style, one.label) for one in series),
            )
        )
    return charts


def memory_charts(report: PruneReport) -> list[Chart]:
    """Draw the measured memory over time and the plan; no charts for a report without the measurements."""
    memory = report.memory
    charts: list[Chart] = []
    mib = 2.0**20
    if memory.timeline:
        points = [(stretch.seconds, stretch.peak_bytes / mib) for stretch in memory.timeline]
        svg = line_chart(
            "peak memory of each stretch of the run, in MiB",
            [Series(label="measured", points=points, markers=len(points) <= 40)],
            Axis(label="seconds from the start", format=short, low=0.0),
            Axis(label="", format=_whole, low=0.0),
            [Level(value=memory.planned_peak_bytes / mib, label=f"planned {format_bytes(memory.planned_peak_bytes)}")],
        )
        phases = ", ".join(dict.fromkeys(stretch.phase for stretch in memory.timeline))
        caption = f"Peak of each stretch above the process's size before the run, in MiB. Phases in order: {phases}."
        charts.append(Chart(title="Measured over time", svg=svg, caption=caption))
    return charts


def _by_kind(blocks: Sequence[BlockReport]) -> dict[str, list[BlockReport]]:
    found: dict[str, list[BlockReport]] = {}
    for block in blocks:
        found.setdefault(block.kind, []).append(block)
    return found


def _numbered(values: Sequence[float]) -> list[tuple[float, float | None]]:
    return [(float(index), value) for index, value in enumerate(values)]


def _whole(value: float) -> str:
    return f"{value:,.0f}"
