"""`structprune compare`: one process per cell, resumable, one table in four forms."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune.api import evaluate, prune
from structprune.recipe import Recipe
from structprune.results.comparison import Comparison

pytestmark = pytest.mark.usefixtures("one_thread")

PROGRAM = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('structprune', run_name='__main__', alter_sys=True)"
)


@pytest.fixture
def arguments(tiny_llama: Path, text_file: Path, tmp_path: Path) -> list[str]:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    texts = [str(text_file), str(other)]
    shared = ["--calibration", str(text_file), "--num-samples", "4", "--seq-len", "32", "--max-windows", "3"]
    settings = ["--set", "multiple_of=1", "dtype=float32"]
    output = ["-o", str(tmp_path / "table"), "--text", *texts]
    return ["compare", str(tiny_llama), *output, *shared, *settings, "--no-speed"]


def result_of(tmp_path: Path) -> Comparison:
    return Comparison.model_validate_json((tmp_path / "table" / "comparison.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_table_says_what_separate_runs_say(
    command_line: Any, arguments: list[str], tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    methods = ["fasp", "structprune", "structprune:target=local"]
    code, out, _ = command_line(*arguments, "--methods", *methods, "--sparsities", 0.25)
    assert code == 0
    found = result_of(tmp_path)
    assert not found.failures
    assert [cell.label for cell in found.cells] == methods
    fields: dict[str, Any] = {"calibration": str(text_file), "num_samples": 4, "seq_len": 32, "multiple_of": 1}
    recipe = Recipe(method="structprune", sparsity=0.25, dtype="float32", **fields)
    report = prune(tiny_llama, recipe, tmp_path / "alone")
    cell = next(c for c in found.cells if c.label == "structprune")
    assert cell.parameters == report.size.parameters_after
    assert cell.kept == {"mlp": [block.kept_units for block in report.blocks]}
    alone = evaluate(tmp_path / "alone", text_file, against=tiny_llama, seq_len=32, max_windows=3, dtype="float32")
    assert cell.texts[0].perplexity == pytest.approx(alone.perplexity, rel=1e-5)
    assert cell.texts[0].kl_to_dense == pytest.approx(alone.kl_to_reference, rel=1e-3)
    assert alone.kl_to_reference is not None
    assert alone.kl_to_reference > 0
    assert cell.texts[1].perplexity != cell.texts[0].perplexity
    # Both runs of structprune ask the same of the dense model; the first has measured it.
    assert [c.shared_seconds > 0 for c in found.cells] == [False, False, True]
    assert all(c.wall_seconds > c.shared_seconds for c in found.cells)
    assert not (tmp_path / "table" / "work").exists()
    rows = list(csv.DictReader((tmp_path / "table" / "comparison.csv").read_text(encoding="utf-8").splitlines()))
    assert sorted(row["method"] for row in rows) == sorted(["dense", *methods])
    by_perplexity = [float(r["perplexity " + text_file.name]) for r in rows if r["method"] != "dense"]
    assert by_perplexity == sorted(by_perplexity)
    for name in ("perplexity-parameters.png", "perplexity-seconds.png"):
        assert (tmp_path / "table" / name).read_bytes().startswith(b"\x89PNG")
    assert "structprune:target=local" in out
    assert str(tmp_path) not in (tmp_path / "table" / "comparison.json").read_text(encoding="utf-8")


@pytest.mark.usefixtures("cells_in_this_process")
def test_methods_that_know_no_units_are_rows_too(command_line: Any, arguments: list[str], tmp_path: Path) -> None:
    """Asked for as many parameters as the others lose in their scope, of blocks as a whole or of the stream."""
    methods = ["depth", "slicegpt", "magnitude"]
    code, _, err = command_line(*arguments, "--methods", *methods, "--sparsities", 0.25)
    assert code == 0, err
    found = result_of(tmp_path)
    assert found.failures == []
    rows = {cell.method: cell for cell in found.cells}
    assert sorted(rows) == sorted(methods)
    asked = rows["magnitude"].removed_share_of_blocks
    assert all(rows[name].removed_share_of_blocks >= asked - 1e-9 for name in methods)
    assert len({cell.scope for cell in found.cells}) == 1


@pytest.mark.usefixtures("cells_in_this_process")
def test_single_weights_stand_beside_whole_units(command_line: Any, arguments: list[str], tmp_path: Path) -> None:
    """Of the same share as many parameters are left that are not zero; settings without a meaning are left out."""
    methods = ["magnitude", "magnitude:pattern=2:4", "wanda:pattern=unstructured"]
    code, out, err = command_line(*arguments, "--methods", *methods, "--sparsities", 0.5, "--no-plots")
    assert code == 0, err
    found = result_of(tmp_path)
    assert found.failures == []
    units, *weights = [next(cell for cell in found.cells if cell.label == label) for label in methods]
    dense = found.dense
    assert dense is not None
    assert units.nonzero_parameters is None
    for cell in weights:
        assert cell.parameters == dense.parameters
        assert cell.nonzero_parameters is not None
        assert cell.nonzero == cell.nonzero_parameters == pytest.approx(units.nonzero, rel=2e-3)
        assert cell.bytes > units.bytes
    assert "not zero" in out
    rows = list(csv.DictReader((tmp_path / "table" / "comparison.csv").read_text(encoding="utf-8").splitlines()))
    assert {row["method"]: int(row["nonzero_parameters"]) for row in rows} == {
        "dense": dense.parameters,
        **{cell.label: cell.nonzero for cell in found.cells},
    }
    assert "not zero" in (tmp_path / "table" / "comparison.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("cells_in_this_process")
def test_methods_at_one_size_instead_of_one_share(command_line: Any, arguments: list[str], tmp_path: Path) -> None:
    """With a limit each method is one cell, under the limit's heading, and has the size that was asked for."""
    methods = ["--methods", "fasp", "depth", "--no-plots"]
    command = [*arguments, *methods, "--set", "target_parameters=20_000", "multiple_of=1", "dtype=float32"]
    code, out, err = command_line(*command)
    assert code == 0, err
    assert "target-parameters 20000 mlp" in out
    cells = result_of(tmp_path).cells
    assert sorted(cell.label for cell in cells) == ["depth", "fasp"]
    assert all(cell.parameters <= 20_000 for cell in cells)
    code, _, err = command_line(*command, "--sparsities", "0.2")
    assert code == 2
    assert "no share is taken beside them" in err


@pytest.mark.usefixtures("cells_in_this_process")
def test_what_is_done_is_not_done_again(command_line: Any, arguments: list[str], tmp_path: Path) -> None:
    assert command_line(*arguments, "--methods", "magnitude", "--sparsities", 0.25)[0] == 0
    first = result_of(tmp_path).cells[0]
    code, _, err = command_line(*arguments, "--methods", "magnitude", "wanda-sp", "--sparsities", 0.25)
    assert code == 0
    assert "1 of 2 cells" in err
    assert "dense" not in err
    assert result_of(tmp_path).cells[0] == first
    assert [cell.label for cell in result_of(tmp_path).cells] == ["magnitude", "wanda-sp"]
    # Another question in the same directory is refused, and nothing is lost.
    code, _, err = command_line(*arguments, "--methods", "magnitude", "--seq-len", 16)
    assert code == 2
    assert "another seq len" in err
    assert len(result_of(tmp_path).cells) == 2


def test_everything_is_checked_before_the_first_cell(command_line: Any, arguments: list[str], tmp_path: Path) -> None:
    for method, word in (
        ("no-such-method", "no-such-method"),
        ("fasp:nonsense=1", "nonsense"),
        ("fasp:damping", "FIELD=VALUE"),
        ("fasp:sparsity=0.9", "sparsity"),
        ("magnitude:target=dense-path", "dense-path"),
        ("structprune:min_retention=0.9", "cannot be reached within the groups' bounds"),
        ("fasp:calibration=corpus", "unknown calibration 'corpus'"),
        ("fasp:memory=100KiB", "fasp:memory=100KiB at "),
    ):
        code, _, err = command_line(*arguments, "--methods", "fasp", method)
        assert code == 2, method
        assert word in err, err
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "table").exists()


@pytest.mark.usefixtures("cells_in_this_process")
def test_a_failing_cell_does_not_stop_the_others(command_line: Any, arguments: list[str], tmp_path: Path) -> None:
    # Refused only when its windows are drawn: headers alone do not tell how long a text is.
    (tmp_path / "short.txt").write_text("too short")
    failing = f"fasp:calibration={tmp_path / 'short.txt'}"
    methods = [failing, "magnitude"]
    code, _, err = command_line(*arguments, "--methods", *methods, "--sparsities", 0.5)
    assert code == 1
    assert f"{failing} at 0.5 failed" in err
    found = result_of(tmp_path)
    assert [cell.label for cell in found.cells] == ["magnitude"]
    assert [failure.label for failure in found.failures] == [failing]


def test_a_damaged_table_is_one_error(command_line: Any, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "comparison.json").write_bytes(b'{"model": "\xff"}')
    code, _, err = command_line(*arguments, "--methods", "magnitude")
    assert code == 2
    assert "the earlier result cannot be read" in err


def test_one_process_fills_a_directory(command_line: Any, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    with (tmp_path / "table" / ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        code, _, err = command_line(*arguments, "--methods", "fasp")
    assert code == 2
    assert "another process" in err


@pytest.mark.usefixtures("cells_in_this_process")
def test_kept_checkpoints_load(command_line: Any, arguments: list[str], tmp_path: Path, text_file: Path) -> None:
    assert command_line(*arguments, "--methods", "fasp", "--sparsities", 0.25, "--keep")[0] == 0
    kept = tmp_path / "table" / "checkpoints" / "fasp-0.25"
    again = evaluate(kept, text_file, seq_len=32, max_windows=3, dtype="float32")
    assert again.perplexity == pytest.approx(result_of(tmp_path).cells[0].texts[0].perplexity, rel=1e-6)


def test_ctrl_c_keeps_what_is_done(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, *arguments, "--methods", "magnitude", "fasp", "--no-plots"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        table = tmp_path / "table" / "comparison.json"
        deadline = time.monotonic() + 240
        while not (table.exists() and json.loads(table.read_text(encoding="utf-8"))["cells"]):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # As a terminal does: to the whole foreground group.
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert len(result_of(tmp_path).cells) >= 1


def test_divergence_of_a_model_from_itself_is_zero(tiny_llama: Path, text_file: Path) -> None:
    result = evaluate(tiny_llama, text_file, against=tiny_llama, seq_len=32, max_windows=2, dtype="float32")
    assert result.kl_to_reference == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1.0
    assert torch.isfinite(torch.tensor(result.perplexity))
