"""The number format of an output: the source's, or the one that is asked for; the plan says its bytes exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gguf import SIZES, stock_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from structprune import Recipe, prune
from structprune.api import export, plan
from structprune.checkpoint.writer import CheckpointWriter
from structprune.errors import NumericalError
from structprune.report.page import prune_page
from structprune.results.summary import summary_rows
from support.command_line import CommandLine
from support.gguf_files import copy_gguf
from support.models import save_tiny
from support.pipeline_cases import RUNS, tiny_recipe

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def file_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def nothing_removed(text_file: Path, **changes: Any) -> Recipe:
    settings = {"method": "fasp", "sparsity": 0.0, "num_samples": 4, "seq_len": 32, "dtype": "float32"}
    return Recipe.build(**{**settings, "calibration": str(text_file), **changes})


def change_weights(source: Path, changed: Mapping[str, Tensor]) -> Path:
    path = source / "model.safetensors"
    save_file({**load_file(path), **changed}, path, metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_every_weight_is_the_source_s_in_that_format(stored: str, wanted: str, text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", dtype=DTYPES[stored])
    recipe = nothing_removed(text_file, output_dtype=wanted)
    foreseen = plan(source, recipe)
    report = prune(source, recipe, tmp_path / "out")
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == DTYPES[wanted]
        assert torch.equal(after[name], tensor.to(DTYPES[wanted])), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == wanted
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == DTYPES[wanted]
    assert report.size.dtypes == foreseen.size.dtypes == [wanted]
    assert report.size.bytes_after == foreseen.size.bytes_after == file_bytes(tmp_path / "out")
    assert foreseen.size.exact


@pytest.mark.parametrize("run", RUNS)
def test_every_pipeline_writes_it_and_the_plan_knows_its_bytes(run: str, text_file: Path, tmp_path: Path) -> None:
    family, settings = RUNS[run]
    source = save_tiny(family, tmp_path / "source", num_blocks=3)
    recipe = tiny_recipe(settings, text_file, output_dtype="bfloat16")
    foreseen = plan(source, recipe)
    report = prune(source, recipe, tmp_path / "out")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert report.size.bytes_after == file_bytes(tmp_path / "out")
    if foreseen.size.exact:
        assert foreseen.size.bytes_after == report.size.bytes_after
        assert foreseen.forecast.num_parameters == report.size.parameters_after
    else:
        # What just the asked share leaves: the files have headers, and what goes is rounded to whole units.
        assert foreseen.size.bytes_after == pytest.approx(2 * report.size.parameters_after, rel=0.12)


@pytest.mark.parametrize("run", ["fasp", "angular", "whole-experts", "slice", "slice-uniform"])
def test_a_source_of_two_formats_keeps_both(run: str, text_file: Path, tmp_path: Path) -> None:
    family, settings = RUNS[run]
    source = save_tiny(family, tmp_path / "source", dtype=torch.bfloat16)
    norms = {name: tensor.float() for name, tensor in weights(source).items() if "norm" in name}
    change_weights(source, norms)
    recipe = tiny_recipe(settings, text_file)
    foreseen = plan(source, recipe)
    report = prune(source, recipe, tmp_path / "out")
    for name, tensor in weights(tmp_path / "out").items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    assert report.size.dtypes == foreseen.size.dtypes == ["bfloat16", "float32"]
    assert foreseen.size.bytes_after == report.size.bytes_after == file_bytes(tmp_path / "out")


def test_several_files_are_foreseen_too(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    recipe = nothing_removed(text_file, output_dtype="bfloat16", max_shard_size=20_000)
    prune(source, recipe, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert plan(source, recipe).size.bytes_after == file_bytes(tmp_path / "out")


@pytest.fixture(scope="module")
def float32_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    source, _ = stock_checkpoint(LlamaConfig(**SIZES), folder / "source")
    export(source, folder / "model.gguf", dtype="float32")
    return folder / "model.gguf"


@pytest.mark.parametrize("embedding", [True, False], ids=["all quantised", "embedding in float32"])
@pytest.mark.parametrize("wanted", ["source", *DTYPES])
def test_a_quantised_file_becomes_bfloat16_by_default(
    wanted: str, embedding: bool, float32_gguf: Path, text_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "q.gguf"
    copy_gguf(float32_gguf, source, quantise=gguf.GGMLQuantizationType.Q8_0)
    if not embedding:
        # The embedding has more numbers than all blocks of a model of this size.
        _with_float32_embedding(float32_gguf, source)
    recipe = nothing_removed(text_file, output_dtype=wanted)
    foreseen = plan(source, recipe)
    prune(source, recipe, tmp_path / "out")
    written = "bfloat16" if wanted == "source" else wanted
    found = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {DTYPES[written]}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == written
    assert foreseen.size.bytes_after == file_bytes(tmp_path / "out")
    numbers = sum(tensor.numel() for tensor in found.values())
    assert 0 < file_bytes(tmp_path / "out") - BYTES[written] * numbers < 4000
    reader: Any = gguf.GGUFReader(str(source))
    stored = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for block in range(2):
        theirs = torch.from_numpy(np.array(stored[f"blk.{block}.ffn_down.weight"], np.float32))
        ours = found[f"model.layers.{block}.mlp.down_proj.weight"]
        assert torch.equal(ours, theirs.reshape(ours.shape).to(DTYPES[written]))


def _with_float32_embedding(wide: Path, target: Path) -> None:
    reader: Any = gguf.GGUFReader(str(wide))
    writer: Any = gguf.GGUFWriter(None, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        value = tensor.data.reshape(tensor.shape[::-1])
        kind = gguf.GGMLQuantizationType.Q8_0
        if value.ndim > 1 and not tensor.name.startswith("token_embd"):
            writer.add_tensor(tensor.name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, value)
    target.unlink(missing_ok=True)
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "name", [NAME, "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"]
)
@pytest.mark.parametrize("method", ["fasp", "depth", "slicegpt"])
def test_a_number_that_float16_cannot_hold_is_an_error(
    method: str, name: str, text_file: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    source = save_tiny("llama", tmp_path / "source")
    tensor = weights(source)[name]
    # 65,510 would be rounded to 65,504: not an infinity, and another number all the same.
    tensor.view(-1)[3] = -65_510.0
    change_weights(source, {name: tensor})
    flags = ["--method", method, "--sparsity", 0.1, "--calibration", text_file, "--num-samples", 4, "--seq-len", 32]
    flags += ["--dtype", "float32", "--no-reload-check", "-q", *(["--scope", "all"] if method != "fasp" else [])]
    code, _, error = command_line("prune", source, "-o", tmp_path / "out", *flags, "--output-dtype", "float16")
    assert (code, repr(name) in error, "float16" in error, "65510" in error) == (2, True, True, True), error
    assert "--output-dtype" in error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_number_at_the_limit_of_float16_is_kept(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    tensor = weights(source)[NAME]
    tensor[2, 3] = 65_504.0
    change_weights(source, {NAME: tensor})
    prune(source, nothing_removed(text_file, output_dtype="float16", reload_check=False), tmp_path / "out")
    assert float(weights(tmp_path / "out")[NAME][2, 3]) == 65_504.0


def test_a_solved_weight_that_float16_cannot_hold_is_never_written(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 1)
    with pytest.raises(NumericalError, match=r"'a\.weight'.*float16 cannot") as caught:
        writer.write(1, {"a.weight": torch.tensor([1.0, 70_000.0]).half(), "b.weight": torch.ones(2)})
    assert "--output-dtype bfloat16 or float32" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", ["dtype", "torch_dtype"])
def test_a_config_that_says_another_format_than_the_files(entry: str, text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source", dtype=torch.float32)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps({**config, entry: "bfloat16"}))
    report = prune(source, nothing_removed(text_file), tmp_path / "out")
    assert any(f"{entry} in config.json is bfloat16 and the weights are float32" in note for note in report.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())[entry] == "float32"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_plan_report_and_page_say_it(text_file: Path, tmp_path: Path, command_line: CommandLine) -> None:
    source = save_tiny("llama", tmp_path / "source")
    flags = ["--method", "fasp", "--num-samples", 4, "--seq-len", 32, "--multiple-of", 8, "--output-dtype", "bfloat16"]
    code, out, _ = command_line("plan", source, *flags)
    assert code == 0
    assert any("bytes on disk" in line and "in bfloat16" in line for line in out.splitlines())
    code, out, _ = command_line("plan", source, *flags, "--json")
    size = json.loads(out)["size"]
    recipe = tiny_recipe({"method": "fasp"}, text_file, num_samples=4, multiple_of=8, output_dtype="bfloat16")
    report = prune(source, recipe, tmp_path / "out")
    assert size == {
        "bytes_before": file_bytes(source),
        "bytes_after": file_bytes(tmp_path / "out"),
        "exact": True,
        "dtypes": ["bfloat16"],
    }
    assert dict(summary_rows(report))["bytes on disk"].endswith("in bfloat16")
    assert "in bfloat16" in prune_page(report)
    assert "in bfloat16" in (tmp_path / "out" / "README.md").read_text()


def test_it_is_part_of_what_makes_two_runs_the_same(text_file: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    recipes = [nothing_removed(text_file, output_dtype=dtype) for dtype in ("source", "bfloat16")]
    reports = [prune(source, recipe, tmp_path / f"in-{recipe.output_dtype}") for recipe in recipes]
    assert reports[0].source_fingerprint == reports[1].source_fingerprint
    assert reports[0].recipe != reports[1].recipe
