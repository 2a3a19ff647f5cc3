"""The run's directory: nothing is overwritten, nothing half-written stays, one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from structprune.errors import InputError
from structprune.runs.directory import JOURNAL_NAME, RunDirectory

# Works on the output named by its argument and is killed before it ends.
_KILLED = """
import os, signal, sys
from pathlib import Path
from structprune.runs.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])) as run:
    run.record("start", recipe="old")
    (run.staging / "checkpoint").mkdir()
    (run.staging / "checkpoint" / "shard").write_text("half")
    (run.staging / "hidden.bin").write_text("states")
    os.kill(os.getpid(), signal.SIGKILL)
"""

# Tries to work on the output named by its argument and says how that went.
_SECOND = """
import sys
from pathlib import Path
from structprune.errors import InputError
from structprune.runs.directory import RunDirectory
try:
    with RunDirectory(Path(sys.argv[1])):
        print("entered")
except InputError as error:
    print(error)
"""


def python(code: str, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(output)], capture_output=True, text=True, timeout=60, check=False
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def events(run: RunDirectory) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run.staging / JOURNAL_NAME).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_commit(output: Path, tmp_path: Path) -> None:
    with RunDirectory(output) as run:
        assert run.staging == tmp_path / "out.partial"
        run.record("start", recipe="abc")
        run.record("block", index=0)
        assert events(run) == [{"event": "start", "recipe": "abc"}, {"event": "block", "index": 0}]
        (run.staging / "checkpoint").mkdir()
        (run.staging / "checkpoint" / "config.json").write_text("{}", encoding="utf-8")
        (run.staging / "hidden.bin").write_bytes(b"states")
        assert not output.exists()
        run.commit(run.staging / "checkpoint")
    assert names(tmp_path) == ["out"]
    assert names(output) == ["config.json"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out"
    with RunDirectory(output) as run:
        (run.staging / "checkpoint").mkdir()
        run.commit(run.staging / "checkpoint")
    assert output.is_dir()


def test_relative_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunDirectory(Path("out")) as run:
        (run.staging / "checkpoint").mkdir()
        run.commit(run.staging / "checkpoint")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_output_that_exists_is_refused(output: Path, kind: str) -> None:
    if kind == "directory":
        output.mkdir()
    else:
        output.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="the output directory exists"):
        RunDirectory(output).check()
    with pytest.raises(InputError, match="the output directory exists"), RunDirectory(output):
        pass
    assert names(output.parent) == ["out"]


def test_foreign_partial_is_refused_and_left_alone(output: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(InputError, match="the working directory exists and is not a run's") as caught:
        RunDirectory(output).check()
    assert caught.value.where == str(foreign)
    with pytest.raises(InputError, match="is not a run's"), RunDirectory(output):
        pass
    assert names(foreign) == ["thesis.tex"]


def test_empty_partial_is_used(output: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with RunDirectory(output) as run:
        assert names(run.staging) == [JOURNAL_NAME]


def test_partial_of_a_killed_run_is_replaced(output: Path, tmp_path: Path) -> None:
    killed = python(_KILLED, output)
    assert killed.returncode == -9, killed.stderr
    assert names(tmp_path) == ["out.partial"]
    assert names(tmp_path / "out.partial") == ["checkpoint", "hidden.bin", JOURNAL_NAME]
    run = RunDirectory(output)
    run.check()
    with run:
        assert names(run.staging) == [JOURNAL_NAME]
        assert events(run) == []
        run.record("start", recipe="new")
        assert events(run) == [{"event": "start", "recipe": "new"}]


def test_second_process_is_refused(output: Path) -> None:
    with RunDirectory(output) as run:
        run.record("start", recipe="first")
        (run.staging / "hidden.bin").write_bytes(b"states")
        second = python(_SECOND, output)
        assert second.stdout.startswith(f"{output}: another process is writing this output"), second.stderr
        assert names(run.staging) == ["hidden.bin", JOURNAL_NAME]
        assert events(run) == [{"event": "start", "recipe": "first"}]
    # The lock ends with the run.
    assert python(_SECOND, output).stdout == "entered\n"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_removes_staging(output: Path, tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with RunDirectory(output) as run:
            (run.staging / "checkpoint").mkdir()
            (run.staging / "checkpoint" / "shard").write_text("half", encoding="utf-8")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert names(tmp_path) == []


def test_exception_after_commit_keeps_the_output(output: Path, tmp_path: Path) -> None:
    def fail() -> None:
        with RunDirectory(output) as run:
            (run.staging / "checkpoint").mkdir()
            run.commit(run.staging / "checkpoint")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_parent_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o500)
    with pytest.raises(InputError, match="parent directory cannot be written"):
        RunDirectory(parent / "out").check()


def test_partial_that_is_a_file_is_refused(output: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError):
        RunDirectory(output).check()


def test_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError):
        RunDirectory(tmp_path / "file" / "out").check()


def test_dangling_link_is_refused(output: Path, tmp_path: Path) -> None:
    output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError):
        RunDirectory(output).check()


@pytest.mark.parametrize("text", [".", "/"])
def test_output_without_a_name_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        RunDirectory(Path(text)).check()


def test_output_that_appeared_during_the_run_is_kept(output: Path) -> None:
    def race() -> None:
        with RunDirectory(output) as run:
            (run.staging / "checkpoint").mkdir()
            output.mkdir()
            (output / "theirs").write_text("mine", encoding="utf-8")
            run.commit(run.staging / "checkpoint")

    with pytest.raises(InputError):
        race()
    assert names(output) == ["theirs"]


def test_link_in_a_stale_partial_is_removed_and_not_followed(output: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "data").write_text("mine", encoding="utf-8")
    stale = tmp_path / "out.partial"
    stale.mkdir()
    (stale / JOURNAL_NAME).touch()
    (stale / "link").symlink_to(tmp_path / "real")
    assert python(_SECOND, output).stdout == "entered\n"
    assert names(stale) == [JOURNAL_NAME]
    assert names(tmp_path / "real") == ["data"]


def test_what_is_resumed_survives_a_kill_and_ctrl_c(output: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), RunDirectory(output, resumed=("state",)) as run:
        (run.staging / "state").mkdir()
        (run.staging / "scratch").mkdir()
        raise KeyboardInterrupt
    with RunDirectory(output, resumed=("state",)) as again:
        assert names(again.staging) == [JOURNAL_NAME, "state"]
    # Any other run of that name clears all of it, and an error leaves nothing behind.
    with pytest.raises(InputError), RunDirectory(output, resumed=("state",)) as third:
        raise InputError("wrong")
    assert not third.staging.exists()
