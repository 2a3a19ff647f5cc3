"""Charts: what is drawn is where it should be, whatever the values, and nothing of the input is markup."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structprune.report.svg import Axis, Level, Series, column_chart, line_chart

HEIGHT_OF_ZERO, HEIGHT_OF_TOP = 166.0, 10.0


def plain(value: float) -> str:
    return f"{value:.3g}"


def linear(low: float | None = None, high: float | None = None) -> Axis:
    return Axis(label="x", format=plain, low=low, high=high)


def log() -> Axis:
    return Axis(label="y", format=plain, log=True)


def numbers(svg: str) -> list[float]:
    """Every coordinate of the drawing."""
    root = ElementTree.fromstring(svg)
    found: list[float] = []
    for element in root.iter():
        found += [float(value) for name, value in element.attrib.items() if name in ("x", "y", "cx", "cy", "x1", "y1")]
        found += [float(value) for value in re.split(r"[ ,]", element.get("points", "")) if value]
    return found


finite = st.floats(min_value=-1e12, max_value=1e12)


@given(st.lists(st.tuples(finite, st.none() | finite), max_size=12), st.booleans())
def test_any_points_give_a_drawing_inside_its_frame(
    points: list[tuple[float, float | None]], logarithmic: bool
) -> None:
    svg = line_chart("t", [Series(label="a", points=points)], linear(), log() if logarithmic else linear())
    assert all(-1 <= number <= 361 for number in numbers(svg))


@given(st.lists(st.none() | st.floats(min_value=0, max_value=1e9), min_size=1, max_size=200))
def test_any_columns_give_a_drawing_inside_its_frame(values: list[float | None]) -> None:
    svg = column_chart("t", [(str(i), value) for i, value in enumerate(values)], "block", linear(low=0.0))
    assert all(-1 <= number <= 361 for number in numbers(svg))
    assert svg.count("<rect") == sum(value is not None for value in values)


def test_values_whose_logarithms_are_equal_have_an_axis() -> None:
    points = [(0.0, 1e12), (1.0, 999999999999.998)]
    svg = line_chart("t", [Series(label="a", points=points)], linear(), log())
    assert svg.count("<circle") == 2
    assert all(-1 <= number <= 361 for number in numbers(svg))


def test_columns_are_as_high_as_their_values() -> None:
    svg = column_chart("t", [("0", 1.0), ("1", 0.5), ("2", None)], "block", linear(low=0.0, high=1.0), marked=[1])
    heights = [float(found) for found in re.findall(r'<rect[^>]*height="([\d.]+)"', svg)]
    assert heights == [HEIGHT_OF_ZERO - HEIGHT_OF_TOP, (HEIGHT_OF_ZERO - HEIGHT_OF_TOP) / 2]
    assert svg.count("marked") == 1


def test_a_gap_breaks_the_line() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 2.0), (4.0, 3.0)]
    svg = line_chart("t", [Series(label="a", points=points)], linear(), linear())
    assert svg.count("<polyline") == 2
    assert svg.count("<circle") == 4


def test_equal_steps_of_a_log_axis_are_equal_factors() -> None:
    svg = line_chart("t", [Series(label="a", points=[(0.0, 1.0), (1.0, 10.0), (2.0, 100.0)])], linear(), log())
    heights = [float(found) for found in re.findall(r'cy="([\d.]+)"', svg)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    # Zero has no logarithm: the point is left out, the others stay.
    svg = line_chart("t", [Series(label="a", points=[(0.0, 0.0), (1.0, 10.0)])], linear(), log())
    assert svg.count("<circle") == 1


def test_a_level_has_its_name() -> None:
    svg = line_chart("t", [Series(label="a", points=[(0.0, 1.0)])], linear(), linear(), [Level(value=3, label="plan")])
    assert ">plan</text>" in svg


def test_text_is_escaped() -> None:
    bad = "<script>\"&'"
    for svg in (
        line_chart(bad, [Series(label=bad, points=[(0.0, 1.0)])], linear(), linear(), [Level(value=1, label=bad)]),
        column_chart(bad, [(bad, 1.0)], bad, linear(low=0.0)),
    ):
        assert "<script" not in svg
        root = ElementTree.fromstring(svg)
        assert root.get("aria-label") == bad


def test_nothing_to_draw_is_said() -> None:
    for svg in (
        line_chart("t", [], linear(), linear()),
        column_chart("t", [("0", None)], "block", linear()),
    ):
        assert "nothing was measured" in svg
