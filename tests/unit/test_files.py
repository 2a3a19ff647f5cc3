"""Files appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from structprune.errors import CheckpointError
from structprune.files import atomic_path, read_json, write_json, write_text


def test_appears_under_its_name_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"content")
        assert not path.exists()
        assert temporary.parent == tmp_path  # a rename is atomic only within one file system
    assert path.read_bytes() == b"content"
    assert list(tmp_path.iterdir()) == [path]


def test_exception_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_exception_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_replaces_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text(path, "old and longer")
    write_text(path, "n\u00e9w")
    assert path.read_bytes() == "n\u00e9w".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    def forget() -> None:
        with atomic_path(tmp_path / "data.bin"):
            pass

    with pytest.raises(FileNotFoundError):
        forget()
    assert list(tmp_path.iterdir()) == []


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "\u00e9"}
    write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert text.endswith("}\n")
    assert "\u00e9" in text


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    """It would be found when something that quotes it is written, at the end of a run."""
    (tmp_path / "value.json").write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "value.json") == {"a": "\U0001f600"}
    (tmp_path / "value.json").write_text('{"a": {"\\ud83d": 1}}')
    with pytest.raises(CheckpointError, match=r"value\.json: the file cannot be read as JSON; got .* surrogates"):
        read_json(tmp_path / "value.json")


def test_value_that_is_no_json_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "value.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []
