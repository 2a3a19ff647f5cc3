"""Tables of the command line on a terminal of 80 columns: no line is longer, no word is broken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from structprune.api import prune
from structprune.cli import main
from structprune.cli.render import comparison_table, report_table
from structprune.cli.tables import print_pairs
from structprune.engine.run.finalize import load_report
from structprune.recipe import Recipe
from structprune.results.comparison import Cell, Comparison, DenseRow, Speed, TextInfo, TextScore

pytestmark = pytest.mark.usefixtures("one_thread")
Printed = Callable[[Callable[[], Any]], tuple[str, str]]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    """Run something on a terminal of 80 columns and on one that is wider than any line; both outputs."""

    def run(work: Callable[[], Any]) -> tuple[str, str]:
        outputs: list[str] = []
        for columns in ("80", "5000"):
            monkeypatch.setenv("COLUMNS", columns)
            capsys.readouterr()
            work()
            outputs.append(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))
        return outputs[0], outputs[1]

    return run


def check(narrow: str, wide: str) -> None:
    """No line longer than 80, and every word is one of the wide output; a path or label may go on after a joint."""
    assert max(map(len, narrow.splitlines())) <= 80
    pieces = {piece for word in wide.split() for piece in (word, *re.split(r"(?<=[/:,])", word))}
    joined = {"".join(parts) for word in wide.split() for parts in runs(re.split(r"(?<=[/:,])", word))}
    rules = re.compile("[\u2500\u2502]+")
    assert {word for word in narrow.split() if not rules.fullmatch(word)} <= pieces | joined


def runs(parts: list[str]) -> list[list[str]]:
    return [parts[i:j] for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]


@pytest.mark.parametrize(
    "arguments", [["inspect", "llama"], ["plan", "llama", "--memory", "1GiB"], ["methods"]], ids=lambda given: given[0]
)
def test_tables_of_verbs(
    arguments: list[str], printed: Printed, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verb() -> None:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0

    monkeypatch.chdir(tiny_llama.parent)
    narrow, wide = printed(verb)
    check(narrow, wide)
    assert len(narrow.splitlines()) > len(wide.splitlines())


def test_summary_of_a_run(printed: Printed, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = {"method": "magnitude", "calibration": str(text_file), "num_samples": 4, "seq_len": 32}
    prune(tiny_llama, Recipe.build(**settings, multiple_of=1, reload_check=False), tmp_path / "out")
    report = load_report(tmp_path / "out").model_copy(update={"source": "llama", "output": "out"})
    check(*printed(lambda: report_table(report)))


LABELS = (
    "structprune",
    "llm-pruner",
    "fasp:target=dense-path,damping=0.01,shrinkage=0.5,sensitivity_samples=12",
    "slicegpt:structure=uniform",
)


def comparison(num_texts: int) -> Comparison:
    names = [f"a-text-with-a-long-name-{number}.jsonl" for number in range(num_texts)]

    def scores(perplexity: float) -> list[TextScore]:
        each = {"kl_to_dense": 0.3125, "top1_agreement": 0.7, "num_windows": 3}
        return [TextScore(text=name, perplexity=perplexity, **each) for name in names]

    speed = Speed(
        prefill_tokens_per_s=900,
        decode_tokens_per_s=40,
        prefill_speedup=1.125,
        decode_speedup=1.25,
        prompt_tokens=512,
        decoded_tokens=32,
    )
    shares = {f"removed_share_of_{what}": 0.1 for what in ("scope", "blocks", "model")}
    cells = [
        Cell(
            key=label + str(sparsity),
            label=label,
            method=label.partition(":")[0],
            sparsity=sparsity,
            scope="attention",
            settings={},
            parameters=98_000_000,
            bytes=200_000_000,
            **shares,
            texts=scores(1234.5),
            speed=speed,
            wall_seconds=1234,
            shared_seconds=100,
            planned_peak_bytes=1_023 * 2**20,
            measured_peak_bytes=1_022 * 2**20,
            calibration_windows=3,
            compute_dtype="float32",
            kept={},
            machine="",
            versions={},
        )
        for sparsity in (0.25, 0.5)
        for label in LABELS
    ]
    return Comparison(
        model="SmolLM2-135M",
        source_fingerprint="",
        calibration="wikitext2",
        texts=[TextInfo(label=name, sha256="") for name in names],
        seq_len=1024,
        max_windows=None,
        dtype="float32",
        device="cpu",
        dense=DenseRow(parameters=134_000_000, bytes=269_000_000, texts=scores(12.5)),
        cells=cells,
    )


@pytest.mark.parametrize("num_texts", [1, 2, 5])
def test_table_of_a_comparison(num_texts: int, printed: Printed) -> None:
    result = comparison(num_texts)
    narrow, wide = printed(lambda: comparison_table(result))
    # Long names of texts become numbers with a legend where they do not fit.
    legend = " ".join(f"text {number + 1} text {number + 1}: {text.label}" for number, text in enumerate(result.texts))
    check(narrow, f"{wide} {legend}")
    for label in LABELS:
        assert any(word.startswith(label.partition(":")[0]) for word in narrow.split())
    for text in result.texts:
        assert text.label in narrow
    assert narrow.count("1234.50") == wide.count("1234.50") == num_texts * len(result.cells)


def test_a_word_that_is_wider_than_the_terminal_stays_whole(printed: Printed) -> None:
    word = "x" * 100
    narrow, _ = printed(lambda: print_pairs("a title", [("name", f"before {word} after")]))
    assert word in narrow.split()


def test_a_long_path_goes_on_after_a_slash(printed: Printed) -> None:
    path = "/".join(["directory"] * 12)
    narrow, wide = printed(lambda: print_pairs("a title", [("output", path)]))
    assert path in wide
    assert max(map(len, narrow.splitlines())) <= 80
    assert "".join(line.partition("\u2502")[2].strip() for line in narrow.splitlines()) == path
