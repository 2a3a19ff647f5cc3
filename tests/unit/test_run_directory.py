"""The run's directory: nothing is overwritten, nothing that is done is lost, one process at a time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from structprune.errors import CheckpointError, DiskFullError, InputError, NumericalError, StructPruneError
from structprune.runs.directory import REJECTED_NAME, RunDirectory
from structprune.runs.journal import JOURNAL_NAME

# Works on the output named by its argument and is killed before it ends.
_KILLED = """
import os, signal, sys
from pathlib import Path
from structprune.runs.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])) as run:
    run.begin(recipe="old")
    (run.checkpoint / "shard").write_text("half")
    (run.checkpoint / ".next.tmp-1").write_text("torn")
    (run.staging / "hidden.bin").write_text("states")
    os.kill(os.getpid(), signal.SIGKILL)
"""

# The same before the first step: nothing is there but what is made on the way to it.
_KILLED_EARLY = """
import os, signal, sys
from pathlib import Path
from structprune.runs.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])) as run:
    run.checkpoint.mkdir()
    (run.staging / "windows.safetensors").write_text("half")
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


def steps(run: RunDirectory) -> list[str]:
    return [json.loads(line)["step"] for line in (run.staging / JOURNAL_NAME).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_commit(output: Path, tmp_path: Path) -> None:
    with RunDirectory(output) as run:
        assert run.staging == tmp_path / "out.partial"
        assert run.start is None
        run.begin(recipe="abc")
        run.journal.record("block 0")
        assert steps(run) == ["start", "block 0"]
        (run.checkpoint / "config.json").write_text("{}", encoding="utf-8")
        (run.staging / "hidden.bin").write_bytes(b"states")
        assert not output.exists()
        run.commit()
    assert names(tmp_path) == ["out"]
    assert names(output) == ["config.json"]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out"
    with RunDirectory(output) as run:
        run.begin()
        run.commit()
    assert output.is_dir()


def test_relative_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunDirectory(Path("out")) as run:
        run.begin()
        run.commit()
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


def test_partial_of_a_killed_run_is_found(output: Path, tmp_path: Path) -> None:
    killed = python(_KILLED, output)
    assert killed.returncode == -9, killed.stderr
    assert names(tmp_path) == ["out.partial"]
    start = RunDirectory(output).peek()
    assert start is not None
    assert start["recipe"] == "old"
    with RunDirectory(output) as run:
        assert run.start == start
        # What was being written is gone.
        assert names(run.checkpoint) == ["shard"]
        run.go_on()
        run.commit()
    assert names(tmp_path) == ["out"]


def test_killed_before_the_first_step_is_no_run(output: Path, tmp_path: Path) -> None:
    killed = python(_KILLED_EARLY, output)
    assert killed.returncode == -9, killed.stderr
    assert RunDirectory(output).peek() is None
    with RunDirectory(output) as run:
        assert run.start is None
        assert names(run.staging) == [JOURNAL_NAME]


@pytest.mark.parametrize("damage", ["flipped", "torn"])
def test_damaged_start_is_said_and_cleared(output: Path, damage: str) -> None:
    assert python(_KILLED, output).returncode == -9
    journal = output.with_name("out.partial") / JOURNAL_NAME
    content = journal.read_bytes()
    journal.write_bytes(content.replace(b"old", b"odd") if damage == "flipped" else content[:-5])
    notes: list[str] = []
    with RunDirectory(output, notes.append) as run:
        assert run.start is None
        assert names(run.staging) == [JOURNAL_NAME]
    assert notes[-1].endswith("the start of the run is not in the journal; all of it is done again")
    assert (f"{journal}: line 1 is damaged; its step is done again" in notes) == (damage == "flipped")


def test_killed_between_the_rename_and_the_removal(output: Path, tmp_path: Path) -> None:
    """The result is there; the next process only tidies up."""
    assert python(_KILLED, output).returncode == -9
    with RunDirectory(output) as run:
        run.journal.record("commit")
        run.checkpoint.rename(output)
    assert names(tmp_path) == ["out", "out.partial"]
    with RunDirectory(output) as run:
        assert run.is_committed()
        run.discard()
    assert names(tmp_path) == ["out"]
    assert names(output) == ["shard"]


def test_second_process_is_refused(output: Path) -> None:
    with RunDirectory(output) as run:
        run.begin(recipe="first")
        (run.staging / "hidden.bin").write_bytes(b"states")
        second = python(_SECOND, output)
        assert second.stdout.startswith(f"{output}: another process is writing this output"), second.stderr
        assert names(run.staging) == ["checkpoint", "hidden.bin", JOURNAL_NAME, "shards"]
        assert steps(run) == ["start"]
    # The lock ends with the run.
    assert python(_SECOND, output).stdout == "entered\n"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_before_the_first_step_removes_staging(
    output: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    def fail() -> None:
        with RunDirectory(output) as run:
            (run.staging / "windows").write_text("half", encoding="utf-8")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert names(tmp_path) == []


def stop(output: Path, error: BaseException) -> None:
    with RunDirectory(output) as run:
        run.begin(recipe="mine")
        raise error


@pytest.mark.parametrize(
    "error", [ValueError("stop"), KeyboardInterrupt("stop"), SystemExit("stop"), CheckpointError("stop")]
)
def test_exception_keeps_what_is_done(output: Path, tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error), match="stop") as caught:
        stop(output, error)
    assert names(tmp_path) == ["out.partial"]
    if isinstance(error, Exception):
        notes = [f"What is done is kept: `structprune resume {output}` goes on where it was."]
        assert caught.value.__notes__ == notes


@pytest.mark.parametrize("error", [InputError("stop"), NumericalError("stop")])
def test_error_that_comes_again_removes_staging(output: Path, tmp_path: Path, error: StructPruneError) -> None:
    with pytest.raises(type(error), match="stop"):
        stop(output, error)
    assert names(tmp_path) == []


def test_full_disk_is_one_clear_error(output: Path, tmp_path: Path) -> None:
    with pytest.raises(DiskFullError) as caught:
        stop(output, OSError(errno.ENOSPC, "No space left on device"))
    assert str(caught.value) == (
        f"{tmp_path}: the disk is full; got [Errno 28] No space left on device. "
        f"Free some; `structprune resume {output}` goes on where it was then."
    )
    assert names(tmp_path) == ["out.partial"]


def test_a_run_by_either_of_its_names(output: Path) -> None:
    assert python(_KILLED, output).returncode == -9
    partial = output.with_name("out.partial")
    assert RunDirectory.named(output).output == RunDirectory.named(partial).output == output
    # An output may be called so itself.
    other = output.with_name("other.partial")
    assert python(_KILLED, other).returncode == -9
    assert RunDirectory.named(other).output == other


def test_another_run_s_state_is_left_alone(output: Path, tmp_path: Path) -> None:
    assert python(_KILLED, output).returncode == -9

    def refused() -> None:
        with RunDirectory(output):
            raise InputError("other settings")

    with pytest.raises(InputError, match="other settings"):
        refused()
    assert RunDirectory(output).peek() is not None


def test_exception_after_commit_keeps_the_output(output: Path, tmp_path: Path) -> None:
    def fail() -> None:
        with RunDirectory(output) as run:
            run.begin()
            run.commit()
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
            run.begin()
            (run.checkpoint / "mine").write_text("result", encoding="utf-8")
            output.mkdir()
            (output / "theirs").write_text("mine", encoding="utf-8")
            run.commit()

    with pytest.raises(InputError, match=r"Move it away; `structprune resume .*out` goes on"):
        race()
    assert names(output) == ["theirs"]
    (output / "theirs").unlink()
    output.rmdir()
    with RunDirectory(output) as run:
        run.go_on()
        run.commit()
    assert names(output) == ["mine"]


def test_link_in_a_stale_partial_is_removed_and_not_followed(output: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "data").write_text("mine", encoding="utf-8")
    stale = tmp_path / "out.partial"
    stale.mkdir()
    (stale / JOURNAL_NAME).write_text('{"step": "start"')  # torn
    (stale / "link").symlink_to(tmp_path / "real")
    assert python(_SECOND, output).stdout == "entered\n"
    assert names(stale) == [JOURNAL_NAME]
    assert names(tmp_path / "real") == ["data"]


@pytest.mark.parametrize(
    "journal",
    [b"my notes\n", b'{"step": 10, "loss": 2.5}\n', b"", b"\x00\xff", b'[{"step": "windows"}]\n'],
)
def test_a_folder_of_the_user_is_left_alone(output: Path, journal: bytes) -> None:
    """Somebody else's file may be called journal.jsonl; only a run's first line makes the folder a run's."""
    partial = output.with_name("out.partial")
    partial.mkdir()
    (partial / JOURNAL_NAME).write_bytes(journal)
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="the working directory exists and is not a run's"), RunDirectory(output):
        pass
    assert (partial / "thesis.txt").read_text() == "mine"
    assert (partial / JOURNAL_NAME).read_bytes() == journal


def test_rejected_output_of_somebody_else(output: Path) -> None:
    rejected = output.with_name("out.rejected")
    rejected.mkdir()
    (rejected / REJECTED_NAME).write_text('{"reason": "bad grammar"}')
    with pytest.raises(InputError, match="the directory of rejected output exists and is not a run's"):
        RunDirectory(output).check()
    (rejected / REJECTED_NAME).write_text('{"got": "a", "wanted": "b"}')
    RunDirectory(output).check()
