"""A run that is killed or interrupted leaves nothing that looks finished, says how it goes on, and does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from structprune.cli import main
from structprune.cli.interrupt import interruptible
from structprune.runs.directory import RunDirectory
from support.models import byte_tokenizer, llama_config

NUM_BLOCKS = 12
# `python -m structprune`, with the interrupt handler that a shell's background job would have switched off.
PROGRAM = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('structprune', run_name='__main__', alter_sys=True)"
)


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough blocks that a run is never over when its first block is."""
    directory = tmp_path_factory.mktemp("slow")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(num_hidden_layers=NUM_BLOCKS)).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def command(slow_model: Path, text_file: Path, tmp_path: Path) -> list[str]:
    flags = ["--calibration", str(text_file), "--num-samples", "24", "--seq-len", "256", "--dtype", "float32"]
    flags += ["--memory", "1GiB"]
    output = str(tmp_path / "out")
    return [
        sys.executable,
        "-c",
        PROGRAM,
        "prune",
        str(slow_model),
        "--method",
        "fasp",
        "-o",
        output,
        *flags,
        "--multiple-of",
        "1",
    ]


@pytest.fixture
def run_until_first_block(command: list[str], tmp_path: Path) -> Generator[subprocess.Popen[str]]:
    """The run, at work on its second block."""
    process = start(command)
    try:
        deadline = time.monotonic() + 240
        while not any(is_block(line) for line in journal(tmp_path / "out.partial")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def is_block(line: dict[str, Any]) -> bool:
    return line["step"].startswith("block ")


def journal(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of the journal so far."""
    try:
        content = (directory / "journal.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def uninterrupted(command: list[str], output: Path) -> dict[str, bytes]:
    """The files of a run with the same settings that nothing cuts, but for those with times."""
    arguments = command[command.index("prune") :]
    arguments[arguments.index("-o") + 1] = str(output)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    return files(output)


def files(output: Path) -> dict[str, bytes]:
    timed = ("pruning_report.json", "pruning_report.html", "README.md")
    return {path.name: path.read_bytes() for path in output.iterdir() if path.name not in timed}


def test_killed_run_goes_on(
    run_until_first_block: subprocess.Popen[str], command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    run_until_first_block.kill()
    assert run_until_first_block.wait() == -signal.SIGKILL
    assert not output.exists()
    lines = [line for line in journal(partial) if is_block(line)]
    assert 0 < len(lines) < NUM_BLOCKS
    left = [path for path in partial.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.startswith("model.safetensors")]
    assert not [path for path in left if path.name == "config.json"]
    # What the journal calls written is there, whole.
    for line in lines:
        ((name, (size, _)),) = line["files"].items()
        assert (partial / name).stat().st_size == size > 0
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(partial / "checkpoint")

    # A kill in the middle of a write leaves a file under a name of its own.
    (partial / "shards" / ".shard-00009.tmp-1").write_bytes(b"half")
    written = {name: (partial / name).stat().st_mtime_ns for line in lines for name in line["files"]}
    kept: dict[str, int] = {}
    discard = RunDirectory.discard

    def looked_at(run: RunDirectory) -> None:
        kept.update({f"{run.shards.name}/{path.name}": path.stat().st_mtime_ns for path in run.shards.iterdir()})
        discard(run)

    monkeypatch.setattr(RunDirectory, "discard", looked_at)
    with pytest.raises(SystemExit) as caught:
        main(command[command.index("prune") :])
    assert caught.value.code == 0
    assert not partial.exists()
    assert kept.items() >= written.items()
    assert len(kept) == NUM_BLOCKS + 2
    assert files(output) == uninterrupted(command, tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.intermediate_size == 33
    assert model.config.num_hidden_layers == NUM_BLOCKS
    assert [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_goes_on(
    run_until_first_block: subprocess.Popen[str], command: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    run_until_first_block.send_signal(number)
    out, err = run_until_first_block.communicate(timeout=120)
    assert run_until_first_block.returncode == 128 + number, err
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert out == ""
    assert "Traceback" not in err
    how = f"`structprune resume {output}` goes on where it was"
    assert err.splitlines()[-1] == f"structprune: interrupted; {how}"
    with pytest.raises(SystemExit) as caught:
        main(["resume", str(output), "--quiet"])
    assert caught.value.code == 0
    assert files(output) == uninterrupted(command, tmp_path / "whole")


def test_full_disk_is_said_and_the_run_goes_on(command: list[str], tmp_path: Path) -> None:
    """No file may grow to the size of a block's shard."""
    output = tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
    command += ["--num-samples", "4"]
    process = start([limit + word if word == PROGRAM else word for word in command])
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith(f"structprune: {tmp_path}: the disk is full; got ")
    assert last.endswith(f"(os error 27). Free some; `structprune resume {output}` goes on where it was then.")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not list((tmp_path / "out.partial" / "checkpoint").iterdir())
    with pytest.raises(SystemExit) as caught:
        main(["resume", str(output), "--quiet"])
    assert caught.value.code == 0
    assert files(output) == uninterrupted(command, tmp_path / "whole")


def test_interrupted_run_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("structprune.api.prune", interrupt)
    with pytest.raises(SystemExit) as caught:
        main(["prune", "model", "-o", str(tmp_path / "out")])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "structprune: interrupted; nothing was written\n"


def test_an_interrupt_that_a_library_turned_into_an_error_is_one() -> None:
    """As native code does that calls back into Python and reports any failure as its own."""

    def library() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("no shape") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            library()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(ValueError, match="on its own"), interruptible():
            raise ValueError("on its own")
    finally:
        signal.signal(signal.SIGINT, before)
