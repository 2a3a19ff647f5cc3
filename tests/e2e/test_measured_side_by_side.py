"""Models measured side by side: every figure is the one that the verb for it gives, and one picture shows them."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from structprune.api import prune
from structprune.assess import EvaluationRequest, SpeedRequest, bench, evaluate, generate, side_by_side
from structprune.checkpoint.reader import CheckpointReader
from structprune.recipe import Recipe
from structprune.report.picture import write_picture

pytestmark = pytest.mark.usefixtures("one_thread")
SVG = "{http://www.w3.org/2000/svg}"


def test_columns_and_picture(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    settings = {"calibration": str(text_file), "num_samples": 4, "seq_len": 32, "dtype": "float32", "multiple_of": 1}
    report = prune(tiny_llama, Recipe.build(method="structprune", **settings), tmp_path / "out")
    models = {"dense": tiny_llama, "pruned": tmp_path / "out"}
    columns = side_by_side(
        models,
        "what",
        EvaluationRequest(texts=[text_file], seq_len=32, max_windows=3, dtype="float32"),
        SpeedRequest(prompts=[16], dtype="float32"),
        max_new_tokens=4,
    )
    assert [one.name for one in columns] == ["dense", "pruned"]
    for one in columns:
        found = evaluate(models[one.name], text_file, seq_len=32, max_windows=3, dtype="float32")
        assert one.perplexities == {str(text_file): found.perplexity}
        assert one.file_bytes == CheckpointReader(models[one.name]).file_bytes
        assert one.says == generate(models[one.name], "what", max_new_tokens=4, dtype="float32")
        assert one.prefill_tokens_per_s > 0 < one.decode_tokens_per_s
    assert [one.parameters for one in columns] == [report.size.parameters_before, report.size.parameters_after]

    write_picture(tmp_path / "demo.svg", 'A "title" & more', columns, report)
    content = (tmp_path / "demo.svg").read_bytes()
    assert len(content) < 30_000
    root = ElementTree.fromstring(content)
    assert root.tag == f"{SVG}svg"
    assert root.attrib["aria-label"] == 'A "title" & more'
    texts = [element.text for element in root.iter(f"{SVG}text")]
    value = columns[1].perplexities[str(text_file)]
    for expected in ("Parameters, millions", f"Perplexity, {text_file}", f"pruned {value:.1f}", "MLP channels kept"):
        assert expected in texts


def test_more_models_are_timed_beside_the_pair(tiny_llama: Path, tmp_path: Path) -> None:
    copies = [shutil.copytree(tiny_llama, tmp_path / name) for name in ("a", "b")]
    found = bench(
        copies[0],
        SpeedRequest(prompts=[8], decode_tokens=2, repeats=2, dtype="float32"),
        against=tiny_llama,
        also=[copies[1]],
    )
    assert [one.model for one in found.models] == [str(copies[0]), str(tiny_llama), str(copies[1])]
    assert [one.points[0].prefill_ratio is None for one in found.models] == [False, True, False]


def test_a_chat_template_is_used(tiny_llama: Path, tmp_path: Path) -> None:
    """A template that drops the message makes every prompt the same one."""
    source = shutil.copytree(tiny_llama, tmp_path / "source")
    plain = [generate(source, prompt, max_new_tokens=6, dtype="float32") for prompt in ("aaaa", "zzzz")]
    (source / "chat_template.jinja").write_text("{% for message in messages %}q{% endfor %}", encoding="utf-8")
    chat = [generate(source, prompt, max_new_tokens=6, dtype="float32") for prompt in ("aaaa", "zzzz")]
    assert plain[0] != plain[1]
    assert chat[0] == chat[1]
