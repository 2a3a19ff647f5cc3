"""Limits of time: the table that `bench --table` makes, and widths that keep to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import structprune
from structprune.api import plan
from structprune.assess import SpeedRequest, record_time, time_widths
from structprune.errors import StructPruneError
from structprune.recipe import Recipe
from structprune.recipe.latency import LatencyLimit, LatencyTable, SublayerTimes
from structprune.report.rebuild import read_report
from structprune.results.measured import Bench, BenchedModel, Rate, SpeedPoint
from structprune.results.report import PruneReport
from structprune.results.sizes import LimitReport
from support.command_line import CommandLine
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 32, "dtype": "float32", "multiple_of": 1}
# A staircase: 48 channels, of which the first 16 are as slow as 8; 2 KV heads. Microseconds.
STAIRS = LatencyTable(
    source="stairs",
    device="cpu",
    dtype="float32",
    batch=1,
    prompt_tokens=32,
    prefill=1000.0,
    decode=100.0,
    sublayers=(
        SublayerTimes(kind="mlp", units=(0, 8, 16, 32, 48), prefill=(0, 40, 40, 150, 200), decode=(0, 1, 2, 4, 6)),
        SublayerTimes(kind="attention", units=(0, 1, 2), prefill=(0, 60, 100), decode=(0, 10, 12)),
    ),
)


@pytest.fixture
def stairs(tmp_path: Path) -> Path:
    path = tmp_path / "stairs.json"
    path.write_text(STAIRS.model_dump_json())
    return path


def asked(text_file: Path, **changes: Any) -> Recipe:
    return Recipe.build(**{"method": "structprune", "calibration": str(text_file), **SETTINGS, **changes})


def taken(report: PruneReport, kind: str, column: str) -> float:
    """What the sublayers of a kind take by the table, in microseconds."""
    times = next(times for times in STAIRS.sublayers if times.kind == kind)
    values = dict(zip(times.units, getattr(times, column), strict=True))
    total = 0.0
    for block in report.blocks:
        if block.kind == kind:
            below = max(units for units in times.units if units <= block.kept_units)
            above = min(units for units in times.units if units >= block.kept_units)
            part = (block.kept_units - below) / max(1, above - below)
            total += values[below] + part * (values[above] - values[below])
    return total


@pytest.mark.parametrize(
    ("limit", "settings", "column", "most"),
    [
        ("0.9x", {}, "prefill", 900),
        ("prefill:0.85ms", {"scope": "all"}, "prefill", 850),
        ("decode:0.93x", {}, "decode", 93),
        ("decode:80us", {"scope": "all", "allow_block_removal": True}, "decode", 80),
    ],
)
def test_widths_keep_to_the_time_that_the_table_says(
    limit: str,
    settings: dict[str, Any],
    column: str,
    most: int,
    tiny_llama: Path,
    text_file: Path,
    stairs: Path,
    tmp_path: Path,
) -> None:
    recipe = asked(text_file, target_latency=limit, latency_table=str(stairs), **settings)
    report = structprune.prune(tiny_llama, recipe, tmp_path / "out")
    (found,) = report.limits
    whole = 1000 if column == "prefill" else 100
    full = {"mlp": 200 if column == "prefill" else 6, "attention": 100 if column == "prefill" else 12}
    kinds = ["mlp", "attention"] if "scope" in settings else ["mlp"]
    expected = whole - sum(2 * full[kind] - taken(report, kind, column) for kind in kinds)
    assert found.predicted == pytest.approx(1000 * expected, abs=8)
    assert found.predicted <= found.at_most == 1000 * most
    assert found.reached is None
    assert not found.is_missed
    assert "structprune bench" in found.line
    assert report.recipe.allocator == "dp"  # type: ignore[union-attr]
    # A stair costs nothing to climb: no block keeps 9 to 15 channels, which are as slow as 16.
    if column == "prefill":
        assert all(not 8 <= block.kept_units < 16 for block in report.blocks if block.kind == "mlp")


def speeds(batch: int, ratio: float | None) -> Bench:
    """Measurements of 64,000 tokens a second, 2,000 in decoding."""
    prefill, decode = (Rate(median=rate, low=rate, high=rate) for rate in (64_000.0, 2_000.0))
    point = SpeedPoint(
        batch=batch,
        prompt_tokens=32,
        decode_tokens=4,
        prefill=prefill,
        decode=decode,
        peak_bytes=1,
        prefill_ratio=ratio,
        decode_ratio=ratio,
    )
    model = BenchedModel(model="out", parameters=1, file_bytes=1, weight_bytes=1, points=[point])
    return Bench(device="cpu", dtype="float32", machine="", repeats=1, models=[model])


@pytest.mark.parametrize(
    ("limit", "measured", "reached"),
    [
        ("0.9x", speeds(1, 1.25), 800_000),
        ("0.9x", speeds(1, 1.0), 1_000_000),
        # A share of a time that was not measured, another batch.
        ("0.9x", speeds(1, None), None),
        ("0.9x", speeds(2, 1.25), None),
        ("prefill:0.9ms", speeds(1, None), 500_000),
        ("decode:95us", speeds(1, None), 500_000),
    ],
)
def test_what_was_measured_is_written_into_the_report(
    limit: str, measured: Bench, reached: int | None, tiny_llama: Path, text_file: Path, stairs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    recipe = asked(text_file, target_latency=limit, latency_table=str(stairs), method="wanda-sp", allocator="dp")
    before = structprune.prune(tiny_llama, recipe, output)
    line = record_time(output, measured)
    (found,) = read_report(output).limits
    assert found.reached == reached
    assert (line is None) == (reached is None)
    assert found.is_missed == ((found.predicted if reached is None else reached) > found.at_most)
    assert found.model_copy(update={"reached": None}) == before.limits[0]
    page = (output / "pruning_report.html").read_text(encoding="utf-8")
    assert (f"reached {reached / 1e6:.2f} ms" if reached else "predicted") in page
    assert record_time(tiny_llama, measured) is None


def test_blocks_go_until_the_time_is_met(text_file: Path, stairs: Path, tmp_path: Path) -> None:
    """300 us a block: the first that goes leaves 700."""
    source = save_tiny("llama", tmp_path / "source", num_blocks=3)
    recipe = Recipe.build(
        method="depth",
        calibration=str(text_file),
        num_samples=2,
        seq_len=32,
        target_latency="prefill:0.75x",
        latency_table=str(stairs),
    )
    report = structprune.prune(source, recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2
    (found,) = report.limits
    assert found.predicted == 700_000


def test_a_table_of_this_machine(command_line: CommandLine, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Times of the whole are above those of the parts, and a plan keeps to a limit by them."""
    path = tmp_path / "table.json"
    timing = ("--prompt", 64, "--decode", 2, "--repeats", 2, "--dtype", "float32")
    code, out, err = command_line("bench", tiny_llama, "--table", path, *timing)
    assert code == 0, err
    assert "--target-latency" in out
    table = LatencyTable.model_validate_json(path.read_text())
    assert {(times.kind, times.units) for times in table.sublayers} == {
        ("mlp", (0, 6, 12, 18, 24, 30, 36, 42, 48)),
        ("attention", (0, 1, 2)),
    }
    assert table.prefill > 0
    assert table.decode > 0
    for times in table.sublayers:
        for phase in ("prefill", "decode"):
            values = [time for _, time in times.nanoseconds(phase)]
            assert values[0] == 0
            assert values == sorted(values)
    found = plan(tiny_llama, asked(text_file, target_latency="0.95x", latency_table=STAIRS.model_dump(mode="json")))
    assert [limit.at_most for limit in found.forecast.limits] == [950_000]


def test_what_no_table_is_made_for(tiny_llama: Path) -> None:
    with pytest.raises(StructPruneError, match="one batch size and one prompt length"):
        time_widths(tiny_llama, SpeedRequest(prompts=[8, 16]))
    with pytest.raises(StructPruneError, match="longer than the model's positions"):
        time_widths(tiny_llama, SpeedRequest(prompts=[100_000]))


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("gemma3_text", {"mlp", "attention"}), ("gpt2", {"mlp"}), ("qwen3_moe", {"mlp", "attention"})],
)
def test_tables_of_other_families(family: str, kinds: set[str], tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "source")
    table = time_widths(source, SpeedRequest(prompts=[16], decode_tokens=1, repeats=1, dtype="float32"))
    assert {times.kind for times in table.sublayers} == kinds
    assert table.prefill > 0


def test_noise_is_smoothed_upwards() -> None:
    """Times that fall where units are added are averaged; what is below the sublayer's absence counts as nothing."""
    times = SublayerTimes(kind="mlp", units=(0, 1, 2, 3), prefill=(0, 3, 1, 4), decode=(0, -1, 2, 2))
    assert times.nanoseconds("prefill") == ((0, 0), (1, 2000), (2, 2000), (3, 4000))
    assert times.nanoseconds("decode") == ((0, 0), (1, 0), (2, 2000), (3, 2000))


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("0.75x", LatencyLimit(phase="prefill", share=0.75)),
        ("decode:0.5x", LatencyLimit(phase="decode", share=0.5)),
        ("prefill:120ms", LatencyLimit(phase="prefill", nanoseconds=120_000_000)),
        ("decode:1.5s", LatencyLimit(phase="decode", nanoseconds=1_500_000_000)),
    ],
)
def test_limits_are_read_as_they_are_written(text: str, limit: LatencyLimit) -> None:
    assert LatencyLimit.read(text) == limit
    assert LatencyLimit.read(str(limit)) == limit


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"target_latency": "0.75"}, r"a limit of time cannot be read; got '0.75'"),
    ({"target_latency": "0x"}, r"a limit of time cannot be read"),
    ({"target_latency": "0.75x", "latency_table": None}, r"kept by a table .*structprune bench MODEL --table FILE"),
    ({"target_latency": "0.75x", "allocator": "closed-form"}, r"takes every unit .*wanted --allocator dp"),
    ({"target_latency": "0.1x"}, r"--target-latency cannot be reached; got 0\.10 ms, wanted at least 0\.65 ms"),
    ({"target_latency": "1.5x"}, r"the model is within the limit already"),
    ({"target_latency": "0.75x", "sparsity": 0.3}, r"--target-latency and --sparsity would decide the same thing"),
    ({"target_latency": "0.9x", "head_units": "query-head", "scope": "all"}, r"times attention of fewer KV heads"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_kept_is_refused(
    changes: dict[str, Any], message: str, tiny_llama: Path, text_file: Path, stairs: Path
) -> None:
    with pytest.raises(StructPruneError, match=message):
        plan(tiny_llama, asked(text_file, **{"latency_table": str(stairs), **changes}))


def test_a_table_of_another_model_is_refused(tiny_llama: Path, text_file: Path) -> None:
    table = STAIRS.model_dump(mode="json")
    table["sublayers"][0]["units"][-1] = 64
    with pytest.raises(StructPruneError, match=r"knows nothing of a sublayer .*got mlp of 48 units, wanted mlp of 64"):
        plan(tiny_llama, asked(text_file, target_latency="0.9x", latency_table=table))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "--latency-table has no times"),
        (
            '{"sublayers": [{"kind": "mlp", "units": [0, 0], "prefill": [0, 1], "decode": [0, 1]}]}',
            "units do not ascend",
        ),
        ('{"sublayers": [{"kind": "mlp", "units": [0, 1], "prefill": [0], "decode": [0, 1]}]}', "different lengths"),
        ('{"prefill": NaN}', "finite|NaN|JSON"),
    ],
)
def test_tables_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(StructPruneError, match=message):
        Recipe.build(method="structprune", target_latency="0.9x", latency_table=str(path))


def test_reports_of_earlier_versions_say_bytes() -> None:
    values = {"name": "bytes", "at_most": 5, "before": 9, "predicted": 4, "reached": 4}
    assert LimitReport.model_validate({**values, "in_bytes": True}).counts == "bytes"
    assert LimitReport.model_validate({**values, "in_bytes": False}).counts == "numbers"
