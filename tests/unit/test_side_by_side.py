"""Models in columns: the table's values and changes, and charts beside each other."""

from __future__ import annotations

from xml.etree import ElementTree

from structprune.report.svg import Axis, column_chart, standalone
from structprune.results.side_by_side import ModelColumn, column_rows


def column(name: str, scale: float) -> ModelColumn:
    return ModelColumn(
        name=name,
        parameters=int(1_000_000 * scale),
        file_bytes=int(2**20 * scale),
        perplexities={"near": 20 / scale, "far": 30 / scale},
        prefill_tokens_per_s=1000 / scale,
        decode_tokens_per_s=50 / scale,
        says=f"I am <{name}>.",
    )


def test_rows_show_values_and_changes_from_the_first() -> None:
    rows = column_rows([column("dense", 1.0), column("pruned", 0.8)])
    assert rows == [
        ("parameters", "1,000,000", "800,000 (-20.0%)"),
        ("bytes on disk", "1.0 MiB", "819.2 KiB (-20.0%)"),
        ("perplexity, near", "20.00", "25.00 (+25.0%)"),
        ("perplexity, far", "30.00", "37.50 (+25.0%)"),
        ("prefill, tokens/s", "1,000", "1,250 (+25.0%)"),
        ("decode, tokens/s", "50.0", "62.5 (+25.0%)"),
    ]


def test_charts_stand_two_in_a_row() -> None:
    chart = column_chart("one", [("a", 1.0)], "", Axis(label="", format=str))
    root = ElementTree.fromstring(standalone("three", [("first", chart), ("second", chart), ("third", chart)], ""))
    inner = list(root.iter("{http://www.w3.org/2000/svg}svg"))[1:]
    places = [(float(one.attrib["x"]), float(one.attrib["y"])) for one in inner]
    assert len(set(places)) == 3
    assert places[0][1] == places[1][1] < places[2][1]
    assert places[0][0] == places[2][0] < places[1][0]
    assert all(x + 360 <= float(root.attrib["width"]) and y + 200 <= float(root.attrib["height"]) for x, y in places)
