"""Code that lies in a checkpoint or that it names never runs, whatever standard input answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from structprune.architectures.stock.loading import check_runs_ours_only, load_model
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError
from support.checkpoints import change, hostile
from support.command_line import CommandLine
from support.models import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

PRUNE = ("--sparsity", "0.3", "--multiple-of", "8", "--num-samples", "4", "--seq-len", "32", "--dtype", "float32", "-q")


def says_yes(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with a standard input that agrees to everything."""
    return subprocess.run(
        [sys.executable, "-m", "structprune", *map(str, arguments)],
        input="y\n" * 50,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def test_nothing_runs_and_the_output_names_no_code(tmp_path: Path, text_file: Path) -> None:
    """A tokenizer with code whose files a stock class reads too: that class is used."""
    model, marker = hostile(tmp_path)
    out = tmp_path / "out"
    done = says_yes("prune", model, "-o", out, "--calibration", text_file, "--method", "fasp", *PRUNE, "--json")
    assert done.returncode == 0, done.stderr
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    assert json.loads((out / "processor_config.json").read_text()) == {"size": 3}
    assert not list(out.rglob("*.py"))
    files = json.loads(done.stdout)["files"]
    assert files["left_out"]["evil.py"] == files["left_out"]["custom_generate/"] == "code, which no output needs"
    assert "tokenizer_config.json" in files["rewritten"]
    # Whoever trusts the output gets the stock class.
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers.")
    assert not marker.exists()


@pytest.fixture
def agreeing(monkeypatch: pytest.MonkeyPatch, command_line: CommandLine) -> CommandLine:
    """The command in this process, where every question is answered with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return command_line


def test_stock_classes_are_enough_to_measure(tmp_path: Path, text_file: Path, agreeing: CommandLine) -> None:
    model, marker = hostile(tmp_path)
    evaluation = ("eval", model, "--text", text_file, "--seq-len", 32)
    for verb in (evaluation, (*evaluation, "--stream"), ("bench", model, "--prompt", 8, "--repeats", 1)):
        code, _, error = agreeing(*verb)
        assert code == 0, error
    assert not marker.exists()


@pytest.mark.parametrize("verb", ["prune", "eval", "eval --stream", "inspect", "bench", "recover", "compare", "export"])
def test_a_type_that_only_code_knows_is_refused(
    verb: str, tmp_path: Path, text_file: Path, agreeing: CommandLine
) -> None:
    model, marker = hostile(tmp_path)
    change(model / "config.json", model_type="evil_type")
    out, text = ("-o", tmp_path / "out"), ("--text", text_file)
    calibration = ("--calibration", text_file)
    arguments = {
        "prune": ("prune", model, *out, *calibration, *PRUNE),
        "eval": ("eval", model, *text, "--seq-len", 32),
        "eval --stream": ("eval", model, *text, "--seq-len", 32, "--stream"),
        "inspect": ("inspect", model),
        "bench": ("bench", model, "--prompt", 8),
        "recover": ("recover", model, "--teacher", model, *out, *calibration),
        "compare": ("compare", model, *out, "--methods", "fasp", "--sparsities", 0.3, *calibration, *text),
        "export": ("export", model, "-o", tmp_path / "out.gguf"),
    }
    code, _, error = agreeing(*arguments[verb])
    assert code == 2, error
    assert "evil_type" in error or "code that lies in a checkpoint is never run here" in error.lower()
    assert not marker.exists()


def test_a_tokenizer_that_is_only_code(tmp_path: Path, text_file: Path, agreeing: CommandLine) -> None:
    """Refused before any work, and the message says how to make files of it."""
    model, marker = hostile(tmp_path)
    change(model / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    code, _, error = agreeing("prune", model, "-o", tmp_path / "out", "--calibration", text_file, *PRUNE)
    assert code == 2
    assert "the tokenizer cannot be loaded" in error
    assert "such code is never run here" in error
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_a_recovered_student_names_only_our_file(
    tmp_path: Path, tiny_llama: Path, text_file: Path, command_line: CommandLine
) -> None:
    """The student's config says where code would come from; the reload check trusts the output's directory."""
    student, out, marker = tmp_path / "student", tmp_path / "out", tmp_path / "ran"
    uneven = ("--method", "structprune", "--structure", "per-layer")
    code, _, error = command_line("prune", tiny_llama, "-o", student, "--calibration", text_file, *PRUNE, *uneven)
    assert code == 0, error
    ours = json.loads((student / "config.json").read_text())["auto_map"]
    (student / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    change(student / "config.json", auto_map={**ours, "AutoConfig": "someone/else--evil.Thing"})
    with pytest.raises(CheckpointError, match=r"names code .*; got config\.json"):
        check_runs_ours_only(student)
    small = ("--calibration", text_file, "--num-samples", 8, "--seq-len", 32, "--dtype", "float32", "-q")
    code, _, error = command_line("recover", student, "--teacher", tiny_llama, "-o", out, *small)
    assert code == 0, error
    assert json.loads((out / "config.json").read_text())["auto_map"] == ours
    assert not marker.exists()


def test_kernels_of_other_repositories(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    change(model / "config.json", attn_implementation="someone/kernel")
    with pytest.raises(CheckpointError, match="attn_implementation names code of another repository"):
        CheckpointReader(model)
    with pytest.raises(CheckpointError, match="attn_implementation names code of another repository"):
        load_model(model, torch.device("cpu"), torch.float32)
