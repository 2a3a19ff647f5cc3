"""The command under torchrun: same result, one voice, a rank that is killed, a link that is cut, what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch import all_finite, environment, free_port, largest_difference, masks

from structprune.api import prune, resume
from structprune.recipe import Recipe
from support.command_line import CommandLine
from support.models import save_tiny

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("one_thread")]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "structprune"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("launched") / "model", num_blocks=8)


def settings(text_file: Path) -> dict[str, Any]:
    return {
        "method": "structprune",
        "calibration": str(text_file),
        "num_samples": 24,
        "seq_len": 64,
        "sensitivity_samples": 4,
        "dtype": "float32",
        "memory": "1GiB",
        "multiple_of": 1,
    }


def flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def wait_until(seen: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + 120
    while not seen():
        assert process.poll() is None, f"it ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def has_done(output: Path, step: str) -> Callable[[], bool]:
    journal = output.with_name(f"{output.name}.partial") / "journal.jsonl"
    return lambda: journal.is_file() and f'"step": "{step}"' in journal.read_text(encoding="utf-8")


def start(command: list[str], **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment() | changes, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def ended_at_last(*processes: subprocess.Popen[str]) -> Generator[None]:
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()


def test_torchrun(model: Path, text_file: Path, tmp_path: Path) -> None:
    alone = prune(model, Recipe.build(**settings(text_file)), tmp_path / "alone")
    command = [*TORCHRUN, "prune", str(model), "-o", str(tmp_path / "two"), *flags(settings(text_file)), "--json"]
    process = start(command)
    with ended_at_last(process):
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    # One rank prints, and one tells how far it is.
    report = json.loads(output)
    assert report["num_ranks"] == 2
    assert report["reload"]["mode"] == "whole"
    assert errors.count("prune 8/8") == 1
    assert masks(tmp_path / "two") == masks(tmp_path / "alone")
    assert largest_difference(tmp_path / "two", tmp_path / "alone") < 1e-4
    assert report["calibration"]["pruned_perplexity"] == pytest.approx(alone.calibration.pruned_perplexity, rel=1e-4)


def two_nodes(port: int) -> list[list[str]]:
    """One launcher per machine, which meet at a port: here both on this one."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    return [[*torchrun, "-m", "structprune"]] * 2


def accelerate(port: int) -> list[list[str]]:
    """Its launcher for GPUs; on a machine without, the ranks take the CPU."""
    pytest.importorskip("accelerate")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [[*launch, "--main_process_port", str(port), "-m", "structprune"]]


@pytest.mark.parametrize("launchers", [two_nodes, accelerate])
def test_other_launchers(
    launchers: Callable[[int], list[list[str]]], model: Path, text_file: Path, tmp_path: Path
) -> None:
    values = settings(text_file) | {"method": "fasp", "num_samples": 4}
    prune(model, Recipe.build(**values), tmp_path / "alone")
    pruned = ["prune", str(model), "-o", str(tmp_path / "two"), *flags(values), "--json"]
    processes = [start([*launcher, *pruned]) for launcher in launchers(free_port())]
    with ended_at_last(*processes):
        said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    # Whichever launcher has rank 0, that one prints.
    (report,) = [json.loads(output) for output, _ in said if output]
    assert report["num_ranks"] == 2
    assert masks(tmp_path / "two") == masks(tmp_path / "alone")
    assert largest_difference(tmp_path / "two", tmp_path / "alone") < 1e-4


def test_a_rank_is_killed_under_torchrun(model: Path, text_file: Path, tmp_path: Path) -> None:
    prune(model, Recipe.build(**settings(text_file)), tmp_path / "alone")
    command = [*TORCHRUN, "prune", str(model), "-o", str(tmp_path / "out"), *flags(settings(text_file))]
    process = start(command)
    with ended_at_last(process):
        wait_until(has_done(tmp_path / "out", "block 1"), process, "the second block was done")
        killed = time.monotonic()
        os.kill(pid_of_rank(process.pid, 1), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
        assert process.returncode != 0
        assert time.monotonic() - killed < 60
    assert errors.count("structprune: shared run: rank 1 is gone") == 1, errors
    assert "interrupted" not in errors
    resume(tmp_path / "out")
    assert masks(tmp_path / "out") == masks(tmp_path / "alone")
    assert largest_difference(tmp_path / "out", tmp_path / "alone") < 1e-4


def test_an_interrupt_of_all_ranks(model: Path, text_file: Path, tmp_path: Path) -> None:
    command = [*TORCHRUN, "prune", str(model), "-o", str(tmp_path / "out"), *flags(settings(text_file))]
    process = start(command)
    with ended_at_last(process):
        wait_until(has_done(tmp_path / "out", "block 1"), process, "the second block was done")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
        assert process.returncode != 0
    assert errors.count("structprune: interrupted; `structprune resume") == 1, errors
    assert (tmp_path / "out.partial").exists()


def pid_of_rank(launcher: int, rank: int) -> int:
    for child in psutil.Process(launcher).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise AssertionError(f"rank {rank} is not there")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "MODEL"], "`structprune eval` is one process's work; got 2 ranks"),
        (["plan", "MODEL"], "`structprune plan` is one process's work; got 2 ranks"),
        (["prune", "MODEL", "-o", "OUT", "--method", "depth"], "method 'depth' is not for several ranks; got 2 ranks"),
        (["prune", "MODEL", "-o", "OUT", "--method", "slicegpt"], "method 'slicegpt' is not for several ranks"),
        (
            ["prune", "MODEL", "-o", "OUT", "--repair", "scales"],
            "a repair is not for several ranks; got --repair",
        ),
        (
            ["prune", "MODEL", "-o", "OUT", "--gates", "graspprune"],
            "learning gates is not for several ranks; got --gates graspprune, 2 ranks",
        ),
        (["prune", "MODEL", "-o", "OUT", "--method", "fasq"], "unknown method 'fasq'"),
    ],
    ids=["eval", "plan", "depth", "slicegpt", "repair", "gates", "unknown"],
)
def test_what_is_refused(arguments: list[str], said: str, model: Path, tmp_path: Path) -> None:
    names = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    process = start([*TORCHRUN, *(names.get(argument, argument) for argument in arguments)])
    with ended_at_last(process):
        _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert sum(said in line for line in errors.splitlines()) == 1, errors
    assert "exitcode  : 2" in errors
    assert not list(tmp_path.iterdir())


def test_half_an_environment_is_refused(
    command_line: CommandLine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    code, _, errors = command_line("prune", model, "-o", tmp_path / "out")
    assert code == 2
    assert "WORLD_SIZE is 2, but RANK, MASTER_PORT are not set" in errors


def run_ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def cut_off() -> Generator[Callable[[], None]]:
    """Two network namespaces, sp0 and sp1, with one link between them; called, it cuts the link."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and ip")
    try:
        run_ip("netns", "add", "sp0")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted: {error.stderr.decode().strip()}")
    try:
        run_ip("netns", "add", "sp1")
        run_ip("-n", "sp0", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", "sp1")
        for number in (0, 1):
            run_ip("-n", f"sp{number}", "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                run_ip("-n", f"sp{number}", "link", "set", link, "up")
        yield lambda: run_ip("-n", "sp1", "link", "set", "eth0", "down")
    finally:
        for name in ("sp0", "sp1"):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_a_link_that_is_cut(cut_off: Callable[[], None], model: Path, text_file: Path, tmp_path: Path) -> None:
    """Neither side hears of the other any more: each final_states, and says whom it misses."""
    port = free_port()
    asked = [*flags(settings(text_file)), "--rank-timeout", "8"]
    ranks = [
        start(
            [
                *f"ip netns exec sp{rank} {sys.executable} -m structprune prune {model} -o {tmp_path / 'out'}".split(),
                *asked,
            ],
            RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="10.77.0.1",
            MASTER_PORT=str(port),
            GLOO_SOCKET_IFNAME="eth0",
        )
        for rank in (0, 1)
    ]
    with ended_at_last(*ranks):
        wait_until(has_done(tmp_path / "out", "block 0"), ranks[0], "the first block was done")
        cut_off()
        said = [process.communicate(timeout=90)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert "rank 1 has given no sign of life for 8 s" in said[0]
    assert "(rank 0) has not answered for 8 s: is the network cut?" in said[1]
    resume(tmp_path / "out")
    assert all_finite(tmp_path / "out")
