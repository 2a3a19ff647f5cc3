"""Every export format: writes once, says what it wrote, and refuses what it does not have before it writes anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import structprune
from structprune.errors import StructPruneError
from structprune.exporters import EXPORTERS
from structprune.exporters.export import EXPORT_DTYPES, Exporter


def target(name: str, directory: Path) -> Path:
    return directory / f"model{EXPORTERS.get(name).suffix}"


@pytest.fixture(params=list(EXPORTERS))
def name(request: pytest.FixtureRequest) -> str:
    for package in EXPORTERS.get(request.param).packages:
        pytest.importorskip(package)
    return request.param


def test_says_what_it_wrote(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    path = target(name, tmp_path)
    result = structprune.export(tiny_llama, path, format=name, dtype="float32")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    assert (result.format, result.path, result.dtype) == (name, str(path), "float32")
    assert result.bytes == sum(file.stat().st_size for file in files) > 0
    assert result.num_tensors > 0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("what", ["dtype", "ending", "tokenizer", "package", "there"])
def test_refuses_before_it_writes(
    name: str, what: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, path = EXPORTERS.get(name), target(name, tmp_path)
    settings: dict[str, Any] = {}
    match what:
        case "dtype":
            settings["dtype"] = next((dtype for dtype in EXPORT_DTYPES if dtype not in exporter.dtypes), "int3")
        case "ending" if exporter.suffix:
            path = tmp_path / "model.other"
        case "tokenizer" if not exporter.copies_tokenizer:
            settings["tokenizer_gguf"] = "a.gguf"
        case "package":
            changed: Exporter = replace(exporter, packages=("not_there",))
            monkeypatch.setattr(EXPORTERS, "get", lambda _: changed)
        case "there":
            path.mkdir()
        case _:
            pytest.skip("nothing to refuse")
    before = list(tmp_path.iterdir())
    with pytest.raises(StructPruneError):
        structprune.export(tiny_llama, path, format=name, **settings)
    assert list(tmp_path.iterdir()) == before
