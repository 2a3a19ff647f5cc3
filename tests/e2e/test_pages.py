"""The HTML pages: what they say, that they hold nothing but themselves, and how they look in a browser."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Generator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from structprune.api import prune
from structprune.assess import EvaluationRequest, SpeedRequest, bench, evaluate_all
from structprune.cli import main
from structprune.errors import InputError
from structprune.recipe import Recipe
from structprune.report.comparison_page import comparison_page
from structprune.report.page import prune_page
from structprune.report.rebuild import read_report, rebuild
from structprune.results.comparison import Cell, Comparison, DenseRow, Failure, TextInfo, TextScore
from structprune.results.memory import DeviceMemoryReport
from structprune.results.report import PruneReport
from structprune.results.summary import warnings
from support.browser import Browser, browser, find_browser
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

BAD = '<script>alert("x")</script><img src=x>&"\''


LOADING = ("src", "href", "srcset", "data", "action", "poster", "background", "onload", "onerror")


class _Text(HTMLParser):
    """Words of a page, its tags, and everything that an attribute could load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [
            f"{name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "onload", "data")
        ]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Output of a run with all that a page can show: both kinds, uneven widths, an iterative solver, a sensitivity
    pass.
    """
    folder = tmp_path_factory.mktemp("pages")
    source = save_tiny("llama", folder / "source", num_blocks=4)
    fields: dict[str, Any] = {"scope": "all", "solver": "admm", "sparsity": 0.4, "multiple_of": 1, "dtype": "float32"}
    recipe = Recipe.build(method="structprune", calibration=str(text_file), num_samples=6, seq_len=48, **fields)
    prune(source, recipe, folder / "out")
    return folder / "out"


def report_of(run: Path) -> PruneReport:
    return read_report(run)


def comparison(num_methods: int = 3) -> Comparison:
    def scores(factor: float) -> list[TextScore]:
        return [
            TextScore(text=f"{name}.txt", perplexity=20 * factor, kl_to_dense=0.1, top1_agreement=0.9, num_windows=3)
            for name in ("one", "two")
        ]

    cells = [
        Cell(
            key=f"{method}-{share}",
            label=f"method{method}",
            method="fasp",
            sparsity=share,
            scope="mlp",
            settings={},
            parameters=round(1e8 * (1 - share)),
            bytes=round(4e8 * (1 - share)),
            removed_share_of_scope=share,
            removed_share_of_blocks=share,
            removed_share_of_model=share,
            texts=scores((1 + method) ** (4 * share)),
            speed=None,
            wall_seconds=10.0 * (1 + method),
            shared_seconds=1.0,
            planned_peak_bytes=10**8,
            measured_peak_bytes=9 * 10**7,
            calibration_windows=48,
            compute_dtype="float32",
            kept={},
            machine="a machine",
            versions={},
        )
        for method in range(num_methods)
        for share in (0.1, 0.3)
    ]
    return Comparison(
        model="model",
        source_fingerprint="0" * 16,
        calibration="text",
        texts=[TextInfo(label="one.txt", sha256="1" * 64), TextInfo(label="two.txt", sha256="2" * 64)],
        seq_len=1024,
        max_windows=16,
        dtype="float32",
        device="cpu",
        dense=DenseRow(parameters=10**8, bytes=4 * 10**8, texts=scores(1.0)),
        cells=cells,
        failures=[Failure(label="other", sparsity=share, error="a reason") for share in (0.3, 0.1)],
    )


def check_alone(page: str) -> _Text:
    """Nothing is loaded, nothing runs."""
    found = _Text(page)
    assert found.loads == []
    assert not found.tags & {"script", "link", "iframe", "img", "object", "base"}
    assert not re.search(r"https?:|url\(|@import", page)
    assert "default-src 'none'" in page
    return found


# What the page says


def test_the_page_says_what_the_report_says(run: Path) -> None:
    report = report_of(run)
    page = (run / "pruning_report.html").read_text(encoding="utf-8")
    found = check_alone(page)
    size = report.size
    for words in (
        f"{size.parameters_before:,}",
        f"{size.parameters_after:,}",
        f"{report.calibration.dense_perplexity:.2f}",
        f"{report.calibration.pruned_perplexity:.2f}",
        "Attention units kept",
        "MLP channels kept",
        "Error, MLP",
        "Energy of the stream, MLP",
        "Sensitivity of the loss, attention",
        "Objective of admm, MLP",
        "Measured over time",
        *report.memory.phases,
        *(runtime.runtime for runtime in report.runtimes),
    ):
        assert words in found.text, words
    # One column per block and kind, with the share in its tool tip.
    for block in report.blocks:
        assert f"block {block.block}: {block.kept_units / block.num_units:.0%}" in page
    assert page.count("<rect") == len(report.blocks)
    # A page is made to be passed on: no path of the machine.
    assert str(run.parent) not in page


def test_memory_over_time(run: Path) -> None:
    memory = report_of(run).memory
    phases = list(dict.fromkeys(stretch.phase for stretch in memory.timeline))
    sensitivity = ["sensitivity: forward", "sensitivity: backward"]
    assert phases == ["set-up", *sensitivity, "prune", "write files", "reload check", "held-out windows", "finish"]
    seconds = [stretch.seconds for stretch in memory.timeline]
    assert seconds == sorted(seconds)
    assert max(stretch.peak_bytes for stretch in memory.timeline) == memory.measured_peak_bytes


def test_report_rebuilds_the_same_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = (run / "pruning_report.html").read_text(encoding="utf-8")
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(run / "pruning_report.json", again)
    with pytest.raises(SystemExit) as caught:
        main(["report", str(again), "--png"])
    assert caught.value.code == 0
    assert (again / "pruning_report.html").read_text(encoding="utf-8") == written
    assert (again / "pruning_report.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines() == [str(again / f"pruning_report.{end}") for end in ("html", "png")]


def test_measurements_go_into_the_table(run: Path, text_file: Path, tmp_path: Path) -> None:
    source = Path(report_of(run).source)
    request = EvaluationRequest(
        texts=[text_file], against=source, seq_len=32, max_windows=2, dtype="float32", stream=True
    )
    evaluation = evaluate_all(run, request)
    speeds = bench(run, SpeedRequest(prompts=[8], decode_tokens=2, repeats=1, dtype="float32"), against=source)
    files = [tmp_path / "eval.json", tmp_path / "bench.json"]
    for file, result in zip(files, (evaluation, speeds), strict=True):
        file.write_text(json.dumps(result.to_dict()))
    shutil.copytree(run, tmp_path / "copy")
    (page,) = rebuild(tmp_path / "copy", files)
    found = check_alone(page.read_text(encoding="utf-8")).text
    (text,) = evaluation.texts
    assert (
        f"perplexity of {text_file.name}, 2 x 32 tokens {text.reference_perplexity:.2f} {text.perplexity:.2f}" in found
    )
    ratio = speeds.models[0].points[0].decode_ratio
    assert f"{ratio:.2f}x" in found
    assert "models in turn, float32 on cpu" in found


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "magnitude"}, "MLP channels kept"),
        ({"method": "depth", "sparsity": 0.5}, "Blocks kept"),
        ({"method": "slicegpt", "sparsity": 0.2}, "Stream before mlp kept"),
        ({"method": "structprune", "allow_block_removal": True, "scope": "all", "sparsity": 0.6}, "removed"),
    ],
)
def test_every_kind_of_run_has_a_page(
    settings: dict[str, Any], words: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    fields = {
        "method": "fasp",
        "calibration": str(text_file),
        "num_samples": 4,
        "seq_len": 32,
        "dtype": "float32",
        **settings,
    }
    prune(tiny_llama, Recipe.build(**fields), tmp_path / "out")
    assert words in check_alone((tmp_path / "out" / "pruning_report.html").read_text(encoding="utf-8")).text


def test_every_value_is_escaped(run: Path) -> None:
    report = report_of(run)
    blocks = [block.model_copy(update={"kind": BAD, "status": BAD}) for block in report.blocks]
    memory = report.memory.model_copy(update={"phases": {BAD: 1}, "store": BAD})
    changed = report.model_copy(
        update={
            "output": BAD,
            "source": BAD,
            "method": BAD,
            "blocks": blocks,
            "memory": memory,
            "device": BAD,
            "calibration": report.calibration.model_copy(update={"description": BAD, "name": BAD}),
            "recipe": report.recipe.model_copy(update={"calibration": (BAD,), "score": BAD}),
            "runtimes": [runtime.model_copy(update={"reason": BAD}) for runtime in report.runtimes],
            "versions": {BAD: BAD},
        }
    )
    found = check_alone(prune_page(changed))
    assert 'alert("x")' in found.text
    assert "<script" not in changed._repr_html_()
    texts = [TextInfo(label=BAD, sha256="1" * 64), TextInfo(label="b", sha256="2" * 64)]
    result = comparison()
    cells = [cell.model_copy(update={"label": BAD, "machine": BAD}) for cell in result.cells]
    check_alone(comparison_page(result.model_copy(update={"model": BAD, "texts": texts, "cells": cells})))


def test_warnings(run: Path) -> None:
    report = report_of(run)
    quiet = report.model_copy(
        update={
            "blocks": [block.model_copy(update={"kept_units": block.num_units - 1}) for block in report.blocks],
            "calibration": report.calibration.model_copy(update={"num_windows": 1000}),
            "memory": report.memory.model_copy(update={"measured_peak_bytes": 1}),
            "recipe": report.recipe.model_copy(update={"allocator": "uniform"}),
        }
    )
    assert warnings(quiet) == []
    blocks = [block.model_copy(update={"status": "damping-raised"}) for block in quiet.blocks[:1]]
    device = DeviceMemoryReport(
        budget_bytes=9, planned_peak_bytes=5, measured_peak_bytes=6, phases={"embed": 5}, sums="device", solves="host"
    )
    over = quiet.memory.model_copy(
        update={"measured_peak_bytes": quiet.memory.planned_peak_bytes + 1, "device": device}
    )
    off = quiet.reload.model_copy(update={"mode": "off", "relative_difference": None, "reason": "--no-reload-check"})
    few = quiet.calibration.model_copy(update={"num_windows": 1, "seq_len": 64})
    loud = quiet.model_copy(update={"blocks": blocks, "memory": over, "reload": off, "calibration": few})
    assert [line.split(" ")[0] for line in warnings(loud)] == ["A", "More", "On", "The", "Only"]
    assert "block 0 (attention)" in warnings(loud)[0]


def test_blocks_at_a_bound_are_named(run: Path) -> None:
    report = report_of(run)
    mlp = [block for block in report.blocks if block.kind == "mlp"]
    recipe = report.recipe.model_copy(update={"min_retention": 0.25, "max_retention": 0.75, "allocator": "closed-form"})
    kept = [12, 20, 36, 48]
    blocks = [block.model_copy(update={"kept_units": number}) for block, number in zip(mlp, kept, strict=True)]
    found = warnings(report.model_copy(update={"recipe": recipe, "blocks": blocks}))
    assert "At the least share that a block keeps (25%, --min-retention): block 0 (mlp)." in found
    assert any(line.startswith("At the largest share") and "blocks 2, 3 (mlp)" in line for line in found)


def test_the_comparisons_page(tmp_path: Path) -> None:
    result = comparison()
    (tmp_path / "comparison.json").write_text(result.model_dump_json())
    (page,) = rebuild(tmp_path)
    found = check_alone(page.read_text(encoding="utf-8")).text
    for words in ("one.txt, by size", "two.txt, by time", "dense 20.00", "other failed at 0.1, 0.3: a reason", "10%"):
        assert words in found
    for cell in result.cells:
        assert f"{cell.texts[0].perplexity:.2f}" in found
    # More methods than colours: every one still has a mark of its own.
    styles = re.findall(r'<li><span class="swatch ([^"]+)">', comparison_page(comparison(12)))
    assert len(set(styles[:12])) == 12
    # Before the first cell there is no table yet.
    check_alone(comparison_page(result.model_copy(update={"cells": [], "dense": None})))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.json", "{}", "the directory holds no report"),
        ("pruning_report.json", "{", "cannot be read as JSON"),
        ("pruning_report.json", "[]", "wanted a JSON object"),
        ("pruning_report.json", '{"schema_version": 99}', "written by a newer structprune"),
        ("pruning_report.json", '{"schema_version": 1}', "not as it was written"),
        ("comparison.json", '{"schema_version": 1, "model": 3}', "not as it was written"),
    ],
)
def test_what_cannot_be_shown_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        rebuild(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_only_measurements_are_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text('{"kind": "other"}')
    with pytest.raises(InputError, match="holds no measurement"):
        rebuild(run, [tmp_path / "no.json"])


# In a notebook


def test_the_report_shows_itself(run: Path) -> None:
    report = report_of(run)
    assert re.fullmatch(r"PruneReport\('structprune', .*, 8 block entries\)", repr(report))
    html = report._repr_html_()
    assert html.startswith("<table>")
    assert f"{report.size.parameters_after:,}" in html
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(report)
    assert "perplexity, in-sample" in capture.get()
    assert f"{report.size.parameters_after:,}" in capture.get()


def test_to_frame_without_pandas(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        report_of(run).to_frame()


def test_to_frame(run: Path) -> None:
    pandas = pytest.importorskip("pandas")
    report = report_of(run)
    frame = report.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["kept_units"]) == [block.kept_units for block in report.blocks]
    assert list(frame["sensitivity"]) == [block.statistics["sensitivity"] for block in report.blocks]
    assert (frame["kept_share"] == frame["kept_units"] / frame["num_units"]).all()


# In a browser


@pytest.fixture(scope="module")
def tab() -> Generator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium is installed")
    with browser(path) as found:
        yield found


@pytest.fixture(scope="module", params=["run", "comparison"])
def page(request: pytest.FixtureRequest, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "run":
        return run / "pruning_report.html"
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "comparison.json").write_text(comparison(12).model_dump_json())
    return rebuild(folder)[0]


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_every_screen_and_asks_for_nothing(width: int, dark: bool, page: Path, tab: Browser) -> None:
    tab.open(page, width=width, dark=dark)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    # What is wider than the screen scrolls inside its own frame.
    outside = "[...document.querySelectorAll('figure, .tile, .warnings, p, h1, h2, .scroll')]"
    outside += ".filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).length"
    assert tab.evaluate(outside) == 0
    assert tab.messages == []
    assert tab.requests == [page.resolve().as_uri()]


def test_text_stays_readable_on_a_phone(page: Path, tab: Browser) -> None:
    tab.open(page, width=360)
    smallest = "Math.min(...[...document.querySelectorAll('text')].map(e => e.getBoundingClientRect().height))"
    assert tab.evaluate(smallest) >= 9
    # No label of a chart leaves its drawing.
    beyond = """[...document.querySelectorAll('svg')].flatMap(svg => {
        const frame = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].map(e => e.getBoundingClientRect())
            .filter(box => box.left < frame.left - 4 || box.right > frame.right + 4);
    }).length"""
    assert tab.evaluate(beyond) == 0


def test_dark_and_printed(page: Path, tab: Browser) -> None:
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    tab.open(page, width=1280)
    assert min(tab.evaluate(background)) > 200
    tab.open(page, width=1280, dark=True)
    assert max(tab.evaluate(background)) < 60
    # On paper it is light whatever the screen is.
    tab.open(page, width=800, dark=True, media="print")
    assert tab.evaluate(background) == [255, 255, 255]
    assert tab.pdf().startswith(b"%PDF")
