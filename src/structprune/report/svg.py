"""Charts as inline SVG: fluid, themed by the page's style sheet, readable without a script.

Every chart is drawn for a width of 360 units, about that of a phone, so that its text keeps its size there; on wider
screens several stand side by side. Values of points are in `<title>` elements, which browsers show as tool tips.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

WIDTH, HEIGHT = 360.0, 200.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 10.0, 10.0, 34.0

# The least value of a log axis and span of another; far above the numbers whose reciprocals overflow.
_SMALLEST = 1e-200

_CLASS = 'class="chart"'

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: (x, y) in order of x. A y of None is a gap."""

    label: str
    points: Sequence[tuple[float, float | None]]
    style: str = "s1"
    """Class of the style sheet: s1, s2, ... for colours, `faint` for one of many."""
    markers: bool = True
    joined: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A horizontal line, with its name if the caption does not say it."""

    value: float
    label: str = ""
    side: Literal["left", "right"] = "right"
    """Where the name stands: where the data is not."""
    below: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """How one axis is scaled and labelled."""

    label: str
    format: Format
    log: bool = False
    low: float | None = None
    """None: from the data."""
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Values -> units of the drawing."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[float, ...] = field(default=())

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis, levels: Sequence[Level] = ()) -> str:
    """Draw lines with markers, without a legend, which the page has. Points that cannot be shown are left out."""
    drawn = [
        replace(one, points=[p for p in one.points if _can_show(x, p[0]) and _can_show(y, p[1])]) for one in series
    ]
    xs = [px for one in drawn for px, _ in one.points]
    ys = [py for one in drawn for _, py in one.points if py is not None] + [level.value for level in levels]
    if not xs or not ys:
        return _frame(title, [_text(WIDTH / 2, HEIGHT / 2, "nothing was measured", "middle")])
    x_scale = _scale(xs, x, _LEFT, WIDTH - _RIGHT, num_ticks=5)
    y_scale = _scale(ys, y, HEIGHT - _BOTTOM, _TOP, num_ticks=4)
    parts = _axes(x_scale, y_scale, x, y)
    for one in drawn:
        for run in _runs(one.points):
            path = " ".join(f"{x_scale(px):.1f},{y_scale(py):.1f}" for px, py in run)
            if len(run) > 1 and one.joined:
                parts.append(f'<polyline class="line {one.style}" points="{path}"/>')
            for px, py in run if one.markers else []:
                place = f'cx="{x_scale(px):.1f}" cy="{y_scale(py):.1f}"'
                tip = _escape(f"{one.label}, {x.format(px)}: {y.format(py)}")
                parts.append(f'<circle class="dot {one.style}" {place} r="2.6"><title>{tip}</title></circle>')
    parts += _levels(levels, y_scale)
    return _frame(title, parts)


def column_chart(
    title: str,
    values: Sequence[tuple[str, float | None]],
    x_label: str,
    y: Axis,
    levels: Sequence[Level] = (),
    marked: Sequence[int] = (),
) -> str:
    """Draw one column per (name, value), from zero; None leaves its place empty. `marked` columns stand out."""
    present = [value for _, value in values if value is not None]
    if not present:
        return _frame(title, [_text(WIDTH / 2, HEIGHT / 2, "nothing was measured", "middle")])
    y_scale = _scale([0.0, *present, *(level.value for level in levels)], y, HEIGHT - _BOTTOM, _TOP, num_ticks=4)
    step = (WIDTH - _LEFT - _RIGHT) / len(values)
    width = max(step - min(2.0, step * 0.25), 0.8)
    x = Axis(label=x_label, format=lambda value: values[round(value)][0])
    every = max(1, math.ceil(len(values) / 8))
    # Each tick stands in the middle of its column.
    x_scale = _Scale(
        low=0.0,
        high=1.0,
        start=_LEFT + step / 2,
        stop=_LEFT + step * 1.5,
        log=False,
        ticks=tuple(float(index) for index in range(0, len(values), every)),
    )
    parts = _axes(x_scale, y_scale, x, y)
    floor = y_scale(0.0)
    for index, (name, value) in enumerate(values):
        if value is None:
            continue
        top = y_scale(value)
        style = "bar marked" if index in marked else "bar"
        place = f'x="{_LEFT + index * step + (step - width) / 2:.1f}" y="{min(top, floor):.1f}"'
        size = f'width="{width:.2f}" height="{max(abs(floor - top), 0.5):.1f}"'
        tip = _escape(f"{x_label} {name}: {y.format(value)}")
        parts.append(f'<rect class="{style}" {place} {size} rx="1"><title>{tip}</title></rect>')
    parts += _levels(levels, y_scale)
    return _frame(title, parts)


def standalone(title: str, charts: Sequence[tuple[str, str]], style: str) -> str:
    """Put charts, each with its heading, into one SVG file, two in a row; `style` is the page's style sheet."""
    gap, heading = 16.0, 24.0
    places = [(gap + n % 2 * (WIDTH + gap), gap + n // 2 * (HEIGHT + heading + gap)) for n in range(len(charts))]
    width = 2 * (WIDTH + gap) + gap
    height = max(y for _, y in places) + heading + HEIGHT + gap
    parts = [f'<rect width="{width:.0f}" height="{height:.0f}" fill="var(--card)"/>']
    for (x, y), (name, chart) in zip(places, charts, strict=True):
        parts.append(f'<text class="heading" x="{x:.0f}" y="{y + 14:.0f}">{_escape(name)}</text>')
        # The style sheet sizes charts by their class; here each has a place of its own.
        size = f'x="{x:.0f}" y="{y + heading:.0f}" width="{WIDTH:.0f}" height="{HEIGHT:.0f}"'
        parts.append(f'<g class="chart">{chart.replace(_CLASS, size, 1)}</g>')
    own = (
        "text { font-family: system-ui, sans-serif; } .heading { font-size: 13px; font-weight: 600; fill: var(--ink); }"
    )
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{_escape(title)}">'
    return f"{head}<style>{style}{own}</style>{''.join(parts)}</svg>\n"


def _frame(title: str, parts: Sequence[str]) -> str:
    label = _escape(title)
    head = f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{label}" {_CLASS}>'
    return head + "".join(parts) + "</svg>"


def _axes(x_scale: _Scale, y_scale: _Scale, x: Axis, y: Axis) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts: list[str] = []
    for value in y_scale.ticks:
        height = y_scale(value)
        parts.append(f'<line class="grid" x1="{_LEFT:.0f}" x2="{right:.0f}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(_text(_LEFT - 6, height + 4, y.format(value), "end"))
    parts.append(f'<line class="axis" x1="{_LEFT:.0f}" x2="{right:.0f}" y1="{bottom:.0f}" y2="{bottom:.0f}"/>')
    for value in x_scale.ticks:
        place = x_scale(value)
        parts.append(_text(place, bottom + 14, x.format(value), "middle"))
    parts.append(_text((_LEFT + right) / 2, HEIGHT - 4, x.label, "middle", "name"))
    return parts


def _levels(levels: Sequence[Level], y_scale: _Scale) -> list[str]:
    parts: list[str] = []
    for level in levels:
        height = y_scale(level.value)
        line = f'x1="{_LEFT:.0f}" x2="{WIDTH - _RIGHT:.0f}" y1="{height:.1f}" y2="{height:.1f}"'
        parts.append(f'<line class="level" {line}/>')
        if not level.label:
            continue
        # Where the chart ends there is no room above.
        place = height + 12 if level.below or height < _TOP + 12 else height - 4
        if level.side == "left":
            parts.append(_text(_LEFT + 4, place, level.label, "start", "name halo"))
        else:
            parts.append(_text(WIDTH - _RIGHT - 2, place, level.label, "end", "name halo"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escape(text)}</text>'


def _can_show(axis: Axis, value: float | None) -> bool:
    return value is None or (math.isfinite(value) and (not axis.log or value > _SMALLEST))


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Split the points into stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for px, py in points:
        if py is None:
            runs.append([])
        else:
            runs[-1].append((px, py))
    return [run for run in runs if run]


def _scale(values: Sequence[float], axis: Axis, start: float, stop: float, *, num_ticks: int) -> _Scale:
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    if axis.log:
        return _log_scale(low, high, start, stop)
    if high - low <= _SMALLEST:
        high = low + max(abs(low), 1.0)
    step = _nice((high - low) / num_ticks)
    low = low if axis.low is not None else math.floor(low / step) * step
    high = high if axis.high is not None else math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    ticks = tuple((first + n) * step for n in range(int((high - first * step) / step + 1e-9) + 1))
    return _Scale(low=low, high=high, start=start, stop=stop, log=False, ticks=ticks)


def _log_scale(low: float, high: float, start: float, stop: float) -> _Scale:
    """Build a logarithmic scale with a margin, and ticks at 1, 2, 5 of each decade, or at decades if there are many."""
    # Of values closer than this the logarithms may be equal.
    if high <= low * (1 + 1e-9):
        low, high = low / 1.5, low * 1.5
    first, last = math.log10(low), math.log10(high)
    margin = 0.04 * (last - first)
    low, high = 10 ** (first - margin), 10 ** (last + margin)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fractions = (1,) if len(decades) > 4 else (1, 2, 5)
    every = max(1, math.ceil(len(decades) / 6))
    ticks = [factor * 10.0**power for power in decades[::every] for factor in fractions]
    shown = tuple(tick for tick in ticks if low <= tick <= high)
    if len(shown) < 2:
        shown = (10**first, 10**last)
    return _Scale(low=low, high=high, start=start, stop=stop, log=True, ticks=shown)


def _nice(step: float) -> float:
    """Round a step up to 1, 2, 2.5, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= step * 0.999)


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
