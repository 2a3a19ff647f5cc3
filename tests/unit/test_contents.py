"""Files are known by what they hold; their times only save reading them again."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from structprune.errors import CheckpointError
from structprune.runs import contents
from structprune.runs.contents import check_unchanged, file_contents, sums


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    return paths


def test_sums(files: list[Path]) -> None:
    data = files[0].read_bytes()
    assert sums(file_contents(files))["a.safetensors"] == [13_000, zlib.crc32(data)]


def test_a_restored_time_hides_nothing(files: list[Path]) -> None:
    """As `cp -p` and `rsync -t` do it: the same size, the old time, another content."""
    before, old = file_contents(files), files[1].stat()
    files[1].write_bytes(b"x" * old.st_size)
    os.utime(files[1], ns=(old.st_atime_ns, old.st_mtime_ns))
    now = file_contents(files, before)
    assert sums(now)["a.safetensors"] == sums(before)["a.safetensors"]
    assert sums(now)["b.safetensors"] != sums(before)["b.safetensors"]
    with pytest.raises(CheckpointError, match=r"written to while the run worked on it; got b\.safetensors"):
        check_unchanged(files, before)


def test_a_touched_file_is_the_same(files: list[Path]) -> None:
    before = file_contents(files)
    files[0].touch()
    files[1].chmod(0o400)
    assert file_contents(files, before) != before
    assert sums(file_contents(files, before)) == sums(before)
    check_unchanged(files, before)


def test_what_was_not_written_to_is_not_read_again(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = file_contents(files)
    files[1].write_bytes(b"other")
    read: list[str] = []
    real = contents.file_sum
    monkeypatch.setattr(contents, "file_sum", lambda path: read.append(path.name) or real(path))
    file_contents(files, before)
    assert read == ["b.safetensors"]
