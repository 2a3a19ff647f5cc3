"""The model card of every output: front matter that the hub's own reader parses, and figures that the report has."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from structprune import Recipe, prune
from structprune.api import export
from structprune.architectures.sources.resolve import hub_id
from structprune.checkpoint.readme import README_NAME, source_metadata
from structprune.report.card import model_card
from structprune.results.report import PruneReport

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")


def run(source: Path, text_file: Path, output: Path, **changes: Any) -> PruneReport:
    settings = {
        "method": "fasp",
        "calibration": str(text_file),
        "num_samples": 4,
        "seq_len": 32,
        "dtype": "float32",
        "multiple_of": 1,
    }
    return prune(source, Recipe.build(**settings | changes), output)


RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "equal widths": ({}, ["- MLP channels: 33 of 48 are left in every block", "as architecture llama"]),
    "uneven widths": (
        {"method": "structprune", "sparsity": 0.4},
        ["| block | MLP channels |", "trust_remote_code=True", "modeling_structprune.py", "as architecture deci"],
    ),
    "depth": ({"method": "depth", "sparsity": 0.3, "multiple_of": None}, ["Blocks ", " of 2, counted from 0."]),
    "shortcuts": (
        {"method": "slicegpt", "sparsity": 0.1, "multiple_of": 4},
        ["Dimensions of the residual stream: ", " of 32 are left in every block.", "trust_remote_code=True"],
    ),
    "heads": (
        {"method": "wanda-sp", "scope": "all", "sparsity": 0.4},
        ["- KV groups of heads: 1 of 2 are left in every block"],
    ),
    "value channels": (
        {"scope": "all", "sparsity": 0.3},
        ["- value channels of all KV heads together: 10 of 16 are left in every block", "trust_remote_code=True"],
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_card(name: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    changes, expected = RUNS[name]
    report = run(tiny_llama, text_file, tmp_path / "smaller", **changes)
    card = ModelCard.load(tmp_path / "smaller" / README_NAME)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == list(dict.fromkeys(["pruned", "structured-pruning", "structprune", report.method]))
    assert "license" not in data
    assert "base_model" not in data
    text = card.text
    for part in expected:
        assert part in text, part
    size = report.size
    assert f"| parameters | {size.parameters_before:,} | {size.parameters_after:,} |" in text
    assert f"| {report.calibration.dense_perplexity:.2f} | {report.calibration.pruned_perplexity:.2f} |" in text
    for support in report.runtimes:
        assert f"| {support.runtime} | {support.loads}" in text
    assert 'from_pretrained("smaller"' in text
    assert "The source states no licence" in text
    # Made to be published: names, no places.
    assert str(tmp_path) not in card.content
    assert str(text_file.parent) not in card.content
    # The recipe that it shows is one.
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0])
    assert Recipe.build(**shown | {"calibration": str(text_file)}).method == report.method
    # Every table is one: as many cells in each line.
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def with_readme(source: Path, target: Path, text: str) -> Path:
    shutil.copytree(source, target)
    (target / README_NAME).write_text(text, encoding="utf-8")
    return target


FRONT = """---
license: other
license_name: llama3
license_link: LICENSE
language:
- en
base_model: someone/dense
tags:
- theirs
---
# Their card
"""


def test_licence_and_origin_are_carried_over(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    source = with_readme(tiny_llama, tmp_path / "source", FRONT)
    run(source, text_file, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / README_NAME).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "llama3", "LICENSE")
    assert data["language"] == ["en"]
    assert data["base_model"] == "someone/dense"
    assert "theirs" not in data["tags"]
    assert "states no licence" not in (tmp_path / "out" / README_NAME).read_text()
    assert (source / README_NAME).read_text() == FRONT
    # And on from there.
    run(tmp_path / "out", text_file, tmp_path / "again", sparsity=0.1)
    again = ModelCard.load(tmp_path / "again" / README_NAME).data.to_dict()
    assert {name: again[name] for name in ("license", "base_model")} == {
        "license": "other",
        "base_model": "someone/dense",
    }


def test_a_model_of_the_hub_is_the_base_model(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = run(tiny_llama, text_file, tmp_path / "out").model_copy(update={"source": "org/model@v1"})
    text = model_card(report, {"license": "mit", "base_model": "someone/dense"}, hub_id("org/model@v1"))
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["base_model"]) == ("mit", "org/model")
    assert "`org/model@v1`, made smaller" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model", "org/model"),
        ("org/model@refs/pr/1", "org/model"),
        ("smollm2", None),
        ("org/model.gguf", None),
        ("a/b/c", None),
        ("{here}", None),
    ],
)
def test_names_of_the_hub(name: str, expected: str | None, tmp_path: Path) -> None:
    assert hub_id(name.replace("{here}", str(tmp_path))) == expected


def test_a_readme_that_cannot_be_read_is_said(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    source = with_readme(tiny_llama, tmp_path / "source", "---\nlicense: [mit\n---\n")
    run(source, text_file, tmp_path / "out")
    assert "front matter of the source's README could not be read" in (tmp_path / "out" / README_NAME).read_text()
    assert source_metadata(source, {"license": "mit"}) == {"unreadable": True, "license": "mit"}


def test_a_gguf_file_keeps_the_licence(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Into the file, and from the file into the card of what is pruned from it."""
    gguf = pytest.importorskip("gguf")
    source = with_readme(tiny_llama, tmp_path / "source", FRONT)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["a", "b"]]
    # In the place of a token that nothing needs.
    vocab = tokenizer["model"]["vocab"]
    vocab["ab"] = vocab.pop("\u0143")
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    export(source, tmp_path / "dense.gguf")
    assert gguf.GGUFReader(tmp_path / "dense.gguf").get_field("general.license").contents() == "other"
    run(tmp_path / "dense.gguf", text_file, tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / README_NAME).data.to_dict()["license"] == "other"


def test_the_report_has_no_card_of_its_own(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    run(tiny_llama, text_file, tmp_path / "out")
    report = PruneReport.model_validate(json.loads((tmp_path / "out" / "pruning_report.json").read_text()))
    assert model_card(report, {}, None) == (tmp_path / "out" / README_NAME).read_text()
