"""Files without an end, names that are no text, numbers that are none, places that cannot be written: one message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from structprune.checkpoint.readme import source_metadata
from structprune.files import plain_name
from support.checkpoints import change
from support.command_line import CommandLine
from support.public_folders import LIKENESSES

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--sparsity", 0.3, "--multiple-of", 8, "--num-samples", 4, "--seq-len", 32, "--dtype", "float32", "-q")


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def prune(command_line: CommandLine, model: Path, text_file: Path, tmp_path: Path) -> Any:
    """Run `prune` on the model, by default with the text, into `out`."""

    def run(*more: object, calibration: object = text_file, output: object = tmp_path / "out") -> tuple[Any, str, str]:
        return command_line("prune", model, "-o", output, "--calibration", calibration, *SMALL, *more)

    return run


def refused(result: tuple[Any, str, str], *words: str) -> None:
    """One line on standard error, and nothing else."""
    code, out, error = result
    assert (code, out) == (2, ""), error
    assert error.startswith("structprune: ")
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error


def test_pipes_are_not_waited_for(prune: Any, command_line: CommandLine, model: Path, tmp_path: Path) -> None:
    """As text, recipe, measurement, config and weights: opening one would wait for ever."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    refused(prune(calibration=fifo), "got a pipe")
    refused(prune("--recipe", fifo), "got a pipe")
    refused(command_line("eval", model, "--text", fifo, "--seq-len", 32, "-q"), "got a pipe")
    assert prune()[0] == 0
    refused(command_line("report", tmp_path / "out", "--with", fifo), "got a pipe")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        copy = shutil.copytree(model, tmp_path / f"with {name}")
        (copy / name).unlink()
        os.mkfifo(copy / name)
        refused(command_line("inspect", copy), name, "got a pipe")


@pytest.mark.parametrize(("path", "got"), [("/dev/zero", "a device"), ("/proc/self/mem", "a file of the kernel")])
def test_files_without_an_end(path: str, got: str, prune: Any) -> None:
    refused(prune(calibration=path), f"got {got}")


@pytest.mark.parametrize("seed", [2**63, 2**64, 10**30, -1])
def test_seeds_beyond_the_generator(seed: int, prune: Any) -> None:
    refused(prune("--seed", seed), "--seed is not usable")


def test_the_largest_seed(prune: Any) -> None:
    code, _, error = prune("--seed", 2**63 - 1)
    assert code == 0, error


def test_names_that_are_no_text(prune: Any, command_line: CommandLine, text_file: Path, tmp_path: Path) -> None:
    bad = os.fsdecode(bytes(tmp_path / "bad") + b"\xff.txt")
    shutil.copy(text_file, bad)
    refused(prune(calibration=bad), "the name of the text file is not text in UTF-8", "bad\\xff.txt")
    refused(prune(output=bad), "the name of the output is not text in UTF-8")
    refused(command_line("inspect", bad), "the name of the model is not text in UTF-8")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("length", [246, 250, 300, 5000])
def test_names_that_are_too_long(length: int, prune: Any, tmp_path: Path) -> None:
    """The working directory's name is the output's and an ending."""
    done = prune(output=tmp_path / ("a" * length))
    if length == 246:
        assert done[0] == 0, done
    else:
        refused(done, "the name of the output is too long")
        refused(prune(calibration="b" * (length + 10) + ".txt"), "the name of the text file is too long")


@pytest.mark.parametrize("value", [0, -1, -0.5, 2**70])
@pytest.mark.parametrize("name", ["max_position_embeddings", "num_attention_heads", "head_dim", "vocab_size"])
def test_sizes_that_are_none(name: str, value: float, model: Path, prune: Any, command_line: CommandLine) -> None:
    change(model / "config.json", **{name: value})
    for result in (prune(), command_line("inspect", model)):
        refused(result, f"{name} is no size", f"got {value}")


def test_a_regular_expression_without_end(model: Path, tmp_path: Path, command_line: CommandLine) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": split}))
    text = tmp_path / "xs.txt"
    text.write_text("x" * 3000)
    code, _, error = command_line("eval", model, "--text", text, "--seq-len", 32, "-q")
    assert code == 2
    assert "the tokenizer cannot encode the text" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_names_in_the_card(prune: Any, text_file: Path, tmp_path: Path) -> None:
    name = "<script>alert(1)<-script>\n# Title `![x](y)`.txt"
    shutil.copy(text_file, tmp_path / name)
    assert prune(calibration=tmp_path / name)[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "_script_alert(1)_-script__# Title ___x_(y)_.txt" in card
    for part in ("<script", "\n# Title", "[x]"):
        assert part not in card
    page = (tmp_path / "out" / "pruning_report.html").read_text()
    assert "<script" not in page


def test_plain_names_stay() -> None:
    for name in ("words.txt (all of its 5 windows; 4 were asked for)", "org/model-1.5_b@v1", "\u00fcber \u6587.txt"):
        assert plain_name(name) == name


@pytest.mark.parametrize(
    "text",
    [
        b"---\nlicense: [\n---\n",
        b"---\n" + b"[" * 5000 + b"\n---\n",
        b"---\nlicense: mit\n",
        b"---\nlicense: {a: b}\n---\n",
        b"---\nlicense: '<script>'\n---\n",
        b"---\n- mit\n---\n",
        b"---\nlicense: \xff\n---\n",
        b"---\n" + b"a: b\n" * 100_000 + b"---\n",
    ],
)
def test_front_matter_that_cannot_be_read(text: bytes, model: Path, prune: Any, tmp_path: Path) -> None:
    (model / "README.md").write_bytes(text)
    assert source_metadata(model, {}) == {"unreadable": True}
    code, _, error = prune()
    assert code == 0, error
    assert "The front matter of the source's README could not be read" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("name", "value"), [("bytes_before", 0), ("parameters_before", 0), ("bytes_before", -3)])
def test_report_files_with_numbers_that_no_run_writes(
    name: str, value: int, prune: Any, command_line: CommandLine, tmp_path: Path
) -> None:
    assert prune()[0] == 0
    path = tmp_path / "out" / "pruning_report.json"
    report = json.loads(path.read_text())
    report["size"][name] = value
    path.write_text(json.dumps(report))
    refused(command_line("report", tmp_path / "out"), name)
    refused(command_line("resume", tmp_path / "out", "-q"), name)


def test_report_files_of_odd_numbers(prune: Any, command_line: CommandLine, tmp_path: Path) -> None:
    """Every number of a report as zero, as negative and as enormous: a page or a message, never a traceback."""
    assert prune()[0] == 0
    path = tmp_path / "out" / "pruning_report.json"
    report = json.loads(path.read_text())
    for place in list(numbers(report)):
        *outer, last = place
        inner: Any = report
        for step in outer:
            inner = inner[step]
        before = inner[last]
        for value in (0, -1, 1e300):
            inner[last] = value
            path.write_text(json.dumps(report))
            code, _, error = command_line("report", tmp_path / "out")
            assert code in (0, 2), (place, value, error)
        inner[last] = before


def numbers(value: Any, place: tuple[Any, ...] = ()) -> Any:
    """Places of the numbers in JSON, the first two of each list."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers(inner, (*place, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:2]):
            yield from numbers(inner, (*place, index))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place


@pytest.mark.parametrize("verb", ["prune", "compare", "export"])
def test_places_that_cannot_be_made(
    verb: str, prune: Any, command_line: CommandLine, model: Path, text_file: Path, tmp_path: Path
) -> None:
    """Even the superuser makes no folder there."""
    place = "/proc/nowhere"
    if verb == "prune":
        result = prune(output="/proc/nowhere/out")
    elif verb == "export":
        # Its tokenizer has a GGUF form, and there is free disk, so that the place is what stops it.
        source = LIKENESSES["Qwen2.5-0.5B-Instruct"].build(tmp_path / "qwen")
        place = str(tmp_path / "file" / "below")
        (tmp_path / "file").write_text("mine")
        result = command_line("export", source, "-o", f"{place}/a.gguf", "-q")
    else:
        cells = ("--methods", "fasp", "--sparsities", 0.3, "--calibration", text_file, "--text", text_file)
        result = command_line("compare", model, "-o", "/proc/nowhere/t", *cells, "--no-plots", "-q")
    refused(result, place, "cannot be made")


def test_a_comparison_does_not_empty_what_is_there(
    command_line: CommandLine, model: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "work").mkdir(parents=True)
    (tmp_path / "mine" / "work" / "thesis.txt").write_text("mine")
    cells = ("--methods", "fasp", "--sparsities", 0.3, "--calibration", text_file, "--text", text_file, "--no-plots")
    result = command_line("compare", model, "-o", tmp_path / "mine", *cells, "-q")
    refused(result, "a folder that a comparison would use is there already")
    assert (tmp_path / "mine" / "work" / "thesis.txt").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_standard_output_costs_a_word(model: Path, text_file: Path, tmp_path: Path) -> None:
    """The work is done by then, and the result stands."""
    command = [sys.executable, "-m", "structprune", "prune", model, "-o", tmp_path / "out", "--calibration", text_file]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [str(word) for word in (*command, *SMALL, "--no-reload-check")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
    assert done.returncode == 0, done.stderr
    assert "standard output cannot be written (No space left on device); what was done stands" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "pruning_report.json").is_file()
