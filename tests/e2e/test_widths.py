"""Widths decided outside, as a file or in the recipe, and the file of widths that every run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import structprune
from structprune.api import plan
from structprune.errors import InputError, StructPruneError
from structprune.recipe import Recipe
from structprune.results.report import PruneReport
from support.command_line import CommandLine

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"num_samples": 4, "seq_len": 32, "dtype": "float32"}


def pruned(source: Path, output: Path, text_file: Path, **changes: Any) -> PruneReport:
    recipe = Recipe.build(calibration=str(text_file), **{"method": "fasp", **SETTINGS, **changes})
    return structprune.prune(source, recipe, output)


def saved(output: Path) -> Any:
    return json.loads((output / "pruning_widths.json").read_text(encoding="utf-8"))


def kept(output: Path) -> Any:
    return json.loads((output / "pruning_manifest.json").read_text(encoding="utf-8"))["kept_indices"]


def file_of(folder: Path, widths: Any) -> Path:
    path = folder / "widths.json"
    path.write_text(json.dumps(widths), encoding="utf-8")
    return path


def test_a_file_decides_the_widths(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Blocks and kinds that are not named keep everything; the sparsity is what the file makes of it."""
    path = file_of(tmp_path, {"0": {"mlp": 31}})
    report = pruned(tiny_llama, tmp_path / "out", text_file, widths=path)
    assert [(block.block, block.kept_units) for block in report.blocks] == [(0, 31), (1, 48)]
    assert report.recipe.scope == "mlp"
    assert report.recipe.sparsity == pytest.approx(17 / 96)
    assert report.size.removed_share_of_scope == pytest.approx(17 / 96)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [31, 48]
    assert saved(tmp_path / "out") == {"head_units": None, "blocks": {"0": {"mlp": 31}, "1": {"mlp": 48}}}


@pytest.mark.parametrize("scope", ["mlp", "all"])
def test_saved_widths_give_the_same_run(scope: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """What an allocator has decided, read back, ends in the same units and weights byte for byte."""
    settings = {"method": "wanda-sp", "multiple_of": 1}
    pruned(tiny_llama, tmp_path / "first", text_file, scope=scope, allocator="closed-form", sparsity=0.3, **settings)
    pruned(tiny_llama, tmp_path / "second", text_file, widths=tmp_path / "first" / "pruning_widths.json", **settings)
    assert len({str(block) for block in saved(tmp_path / "first")["blocks"].values()}) > 1
    assert saved(tmp_path / "second") == saved(tmp_path / "first")
    assert kept(tmp_path / "second") == kept(tmp_path / "first")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_equal_widths_become_a_stock_config(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    widths = {"0": {"mlp": 40}, "1": {"mlp": 40}}
    report = pruned(tiny_llama, tmp_path / "out", text_file, widths=widths)
    assert not report.recipe.per_layer
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size == 40


def test_zero_removes_the_sublayer(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Its norm goes too, and the forecast of parameters is exact."""
    recipe = Recipe.build(
        method="fasp", calibration=str(text_file), widths={"1": {"mlp": 0, "attention": 0}}, **SETTINGS
    )
    forecast = plan(tiny_llama, recipe).forecast.num_parameters
    report = structprune.prune(tiny_llama, recipe, tmp_path / "out")
    assert report.size.parameters_after == forecast
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    dense.model.layers = dense.model.layers[:1]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits)


def test_depth_saves_what_units_can_read(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    pruned(tiny_llama, tmp_path / "depth", text_file, method="depth", scope="all", sparsity=0.5)
    gone = [number for number, kinds in saved(tmp_path / "depth")["blocks"].items() if not any(kinds.values())]
    (removed,) = set(range(2)) - set(kept(tmp_path / "depth")["blocks"])
    assert gone == [str(removed)]
    report = pruned(tiny_llama, tmp_path / "units", text_file, widths=tmp_path / "depth" / "pruning_widths.json")
    assert {block.block for block in report.blocks if block.kept_units == 0} == {removed}


def test_the_recipe_of_the_report_asks_for_the_same(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """The widths themselves are in the recipe: the file may be gone."""
    path = file_of(tmp_path, {"0": {"attention": 1}})
    report = pruned(tiny_llama, tmp_path / "first", text_file, widths=path, method="wanda-sp")
    path.unlink()
    again = Recipe.build(**{**report.recipe.model_dump(mode="json"), "memory": None})
    structprune.prune(tiny_llama, again, tmp_path / "second")
    assert kept(tmp_path / "second") == kept(tmp_path / "first")
    assert report.recipe.scope == "attention"


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"0": {"mlp": 49}}, r"block 0, mlp: .*more units than there are; got 49, wanted at most 48"),
        ({"2": {"mlp": 3}}, r"does not have; got block 2, wanted blocks 0 to 1"),
        ({"0": {"ffn": 3}}, r"block 0, ffn"),
        ({"0": {"mlp": -1}}, r"block 0, mlp: .*greater than or equal to 0; got -1"),
        ({"0": {"mlp": 3.5}}, r"block 0, mlp: .*valid integer; got 3.5"),
        ({"0": {"mlp": True}}, r"block 0, mlp: .*valid integer; got True"),
        ({"x": {"mlp": 3}}, r"block x: .*valid integer"),
        ({"0": 3}, r"block 0: .*valid dictionary; got 3"),
        ({}, r"names no block"),
        ({"0": {"mlp": 0}, "1": {"mlp": 0}}, r"leaves nothing"),
    ],
)
def test_what_cannot_be_kept(widths: Any, message: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        pruned(tiny_llama, tmp_path / "out", text_file, widths=file_of(tmp_path, widths))
    assert [path.name for path in tmp_path.iterdir()] == ["widths.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": {"mlp": 24}, "0": {"mlp": 40}}', "'0' is there twice"),
        ('{"0": {"mlp": 24, "mlp": 40}}', "'mlp' is there twice"),
        ('{"blocks": {"1": {"mlp": 24}, "01": {"mlp": 40}}}', "names a block twice; got 1, 01"),
    ],
)
def test_a_block_that_is_named_twice(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "widths.json"
    path.write_text(text)
    with pytest.raises(StructPruneError, match=message):
        Recipe.build(widths=str(path))


def test_a_block_that_a_recipe_names_twice(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("widths:\n  0: {mlp: 24}\n  1: {mlp: 8}\n  0: {mlp: 40}\n")
    with pytest.raises(InputError, match="has the field '0' twice"):
        Recipe.from_yaml(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.3}, r"--sparsity and --widths .*got 0.3, wanted --widths alone, which removes 17.7083%"),
        ({"allocator": "uniform"}, r"--allocator and --widths"),
        ({"protect_first": 1, "min_retention": 0.5}, r"--min-retention, --protect-first and --widths"),
        ({"structure": "uniform"}, r"every block its own width"),
        ({"multiple_of": 8}, r"block 0, mlp: .*no multiple of 8; got 31, wanted 24 or 32"),
        ({"scope": "attention"}, r"names mlp, which is not in scope"),
        ({"method": "depth"}, r"--widths has no meaning for method 'depth'"),
    ],
)
def test_what_contradicts_them(
    settings: dict[str, Any], message: str, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(StructPruneError, match=message):
        pruned(tiny_llama, tmp_path / "out", text_file, widths=file_of(tmp_path, {"0": {"mlp": 31}}), **settings)


def test_units_of_another_kind_are_not_taken_for_heads(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, {"head_units": "query-head", "blocks": {"0": {"attention": 1}}})
    with pytest.raises(InputError, match=r"other units .*--head-units kv-group, wanted --head-units query-head"):
        pruned(tiny_llama, tmp_path / "out", text_file, widths=path, head_units="kv-group")
    report = pruned(tiny_llama, tmp_path / "out", text_file, widths=path, method="wanda-sp")
    assert report.recipe.model_dump()["head_units"] == "query-head"


def test_the_allocator_needs_them(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to read; wanted --widths FILE"):
        pruned(tiny_llama, tmp_path / "out", text_file, allocator="widths")


def test_command_line(command_line: CommandLine, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, {"0": {"mlp": 31}})
    code, shown, _ = command_line(
        "plan", tiny_llama, "--widths", path, "--method", "fasp", "--calibration", text_file, "--num-samples", 4
    )
    assert code == 0
    assert "31 to 48" in shown
    code, _, said = command_line("plan", tiny_llama, "--widths", tmp_path / "none.json")
    assert code == 2
    assert "there is no file of widths here" in said
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000, encoding="utf-8")
    code, _, said = command_line("plan", tiny_llama, "--widths", deep)
    assert code == 2
    assert "cannot be read as JSON" in said
