"""Every export format refuses what it does not have before it writes anything, and says what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from structprune.api import export
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


@pytest.mark.parametrize("what", ["dtype", "ending", "tokenizer", "package", "there"])
def test_refuses_before_it_writes(
    name: str, what: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, path = EXPORTERS.get(name), target(name, tmp_path)
    settings: dict[str, Any] = {}
    said = {
        "dtype": "dtype",
        "ending": f"ends in {exporter.suffix}",
        "tokenizer": "takes no tokenizer",
        "package": "further packages",
        "there": "exist",
    }[what]
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
    with pytest.raises(StructPruneError, match=said):
        export(tiny_llama, path, format=name, **settings)
    assert list(tmp_path.iterdir()) == before
