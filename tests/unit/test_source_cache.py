"""The cache of converted models, with two processes that want the same one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from structprune.architectures.sources import gguf
from structprune.architectures.sources.resolve import resolve_model
from structprune.checkpoint.reader import INDEX_NAME


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STRUCTPRUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "some.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_one_of_two_at_once_converts_and_both_get_its_result(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []
    both = threading.Barrier(2)

    def convert(_: Path, staging: Path) -> None:
        started.append(staging)
        time.sleep(0.3)
        (staging / INDEX_NAME).write_text("{}", encoding="utf-8")

    def resolve(name: str) -> Path:
        both.wait()
        found = resolve_model(name)
        assert (found / INDEX_NAME).exists()
        return found

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(resolve, [str(model)] * 2)
    assert first == second
    assert len(started) == 1


def test_what_a_killed_process_left_is_no_part_of_the_next_conversion(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []

    def convert(_: Path, staging: Path) -> None:
        places.append(staging)
        (staging / INDEX_NAME).write_text("{}", encoding="utf-8")

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    found = resolve_model(str(model))
    (found / INDEX_NAME).unlink()
    places[0].mkdir()
    (places[0] / "half.safetensors").write_bytes(b"half")
    assert resolve_model(str(model)) == found
    assert [path.name for path in found.iterdir()] == [INDEX_NAME]
