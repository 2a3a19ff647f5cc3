"""A run that is killed leaves nothing that looks finished and can be repeated; Ctrl-C leaves nothing at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conftest import byte_tokenizer, llama_config
from structprune.cli import main
from structprune.cli.interrupt import interruptible

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
    output = str(tmp_path / "out")
    return [sys.executable, "-c", PROGRAM, "prune", str(slow_model), "-o", output, *flags, "--multiple-of", "1"]


@pytest.fixture
def run_until_first_block(command: list[str], tmp_path: Path) -> Generator[subprocess.Popen[str]]:
    """The run, at work on its second block."""
    process = start(command)
    try:
        deadline = time.monotonic() + 240
        while not any(event["event"] == "block" for event in journal(tmp_path / "out.partial")):
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


def journal(directory: Path) -> list[dict[str, object]]:
    """The whole lines of the journal so far."""
    try:
        content = (directory / "journal.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def test_killed_run_can_be_repeated(
    run_until_first_block: subprocess.Popen[str], command: list[str], tmp_path: Path
) -> None:
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    run_until_first_block.kill()
    assert run_until_first_block.wait() == -signal.SIGKILL
    assert not output.exists()
    events = journal(partial)
    assert [event["event"] for event in events[:2]] == ["start", "block"]
    num_done = len(events) - 1
    assert num_done < NUM_BLOCKS
    left = [path for path in partial.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.startswith("model.safetensors")]
    assert not [path for path in left if path.name == "config.json"]
    # What the journal calls written is there, whole.
    for event in events[1:]:
        assert (partial / "checkpoint" / str(event["shard"])).stat().st_size > 0
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(partial / "checkpoint")

    # Proof that the second run clears what the first one left.
    (partial / "checkpoint" / "stale.safetensors").write_bytes(b"stale")
    with pytest.raises(SystemExit) as caught:
        main(command[command.index("prune") :])
    assert caught.value.code == 0
    assert not partial.exists()
    assert not (output / "stale.safetensors").exists()
    assert not (output / "journal.jsonl").exists()
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.intermediate_size == 33
    assert model.config.num_hidden_layers == NUM_BLOCKS
    assert len(list(output.glob("*.safetensors"))) == NUM_BLOCKS + 2


def test_interrupted_run_leaves_nothing(run_until_first_block: subprocess.Popen[str], tmp_path: Path) -> None:
    run_until_first_block.send_signal(signal.SIGINT)
    out, err = run_until_first_block.communicate(timeout=120)
    assert run_until_first_block.returncode == 130, err
    assert list(tmp_path.iterdir()) == []
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "structprune: interrupted; nothing was written"


def test_interrupted_run_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
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
