"""Sources that are larger than the memory: a shard is never read as a whole, whatever its dtype and however many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from structprune import prune
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from structprune.memory import PeakMeter
from structprune.recipe import Recipe
from support.models import byte_tokenizer, llama_config

pytestmark = pytest.mark.usefixtures("one_thread")

MIB = 2**20


def sparse_checkpoint(config: LlamaConfig, directory: Path) -> Path:
    """A checkpoint in one shard of float32 zeros that takes no space on disk; norms are ones."""
    directory.mkdir()
    with torch.device("meta"):
        shapes = {name: list(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    del shapes["lm_head.weight"]
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / SINGLE_NAME).open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if len(shape) == 1:
                handle.seek(8 + len(text) + header[name]["data_offsets"][0])
                handle.write(torch.ones(shape).numpy().tobytes())
        handle.truncate(8 + len(text) + end)
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 blocks of 12.3 MiB in one shard."""
    sizes = {"hidden_size": 128, "intermediate_size": 8192, "num_hidden_layers": 30, "max_position_embeddings": 64}
    directory = sparse_checkpoint(llama_config(**sizes), tmp_path_factory.mktemp("large") / "llama")
    assert (directory / SINGLE_NAME).stat().st_size > 360 * MIB
    return directory


def test_a_tensor_is_read_without_its_shard(large: Path) -> None:
    reader = CheckpointReader(large)
    name = "model.layers.17.mlp.up_proj.weight"
    num_bytes = reader.num_bytes([name])
    assert num_bytes == 4 * MIB
    reader.read(["model.norm.weight"])
    with PeakMeter() as meter:
        tensor = reader.read([name])[name]
    assert tensor.shape == (8192, 128)
    # The copy, and the pages of the mapping that it was read from.
    assert num_bytes <= meter.peak_bytes < 2 * num_bytes + 4 * MIB < reader.file_bytes / 30


def test_rows_are_read_without_their_tensor(tmp_path: Path) -> None:
    config = llama_config(vocab_size=100_000, hidden_size=256, num_hidden_layers=1)
    reader = CheckpointReader(sparse_checkpoint(config, tmp_path / "wide"))
    name = "model.embed_tokens.weight"
    assert reader.num_bytes([name]) > 97 * MIB
    # Code of the libraries that a first read loads is no memory of the rows.
    next(iter(reader.read_rows(name, 1000)))
    with PeakMeter() as meter:
        num_rows = sum(len(rows) for _, rows in reader.read_rows(name, 1000))
    assert num_rows == 100_000
    assert meter.peak_bytes < reader.num_bytes([name]) / 6


def test_a_shard_larger_than_the_budget_is_pruned(large: Path, text_file: Path, tmp_path: Path) -> None:
    settings = {"method": "magnitude", "sparsity": 0.5, "calibration": str(text_file), "num_samples": 2, "seq_len": 32}
    recipe = Recipe.build(**settings, dtype="float32", memory="180MiB", reload_check=False)
    report = prune(large, recipe, tmp_path / "out")
    shard_bytes = (large / SINGLE_NAME).stat().st_size
    assert report.memory.budget_bytes == 180 * MIB < shard_bytes / 2
    assert report.memory.measured_peak_bytes <= report.memory.planned_peak_bytes <= 180 * MIB
    assert report.size.bytes_after > 180 * MIB


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_shard_or_many(tied: bool, dtype: torch.dtype, text_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(tie_word_embeddings=tied)).to(dtype)
    outputs: list[dict[str, torch.Tensor]] = []
    for name, shard_size in (("one", "5GB"), ("many", "10KB")):
        source = tmp_path / name
        model.save_pretrained(source, max_shard_size=shard_size)
        byte_tokenizer().save_pretrained(source)
        assert (source / INDEX_NAME).exists() is (name == "many")
        settings = {"method": "fasp", "sparsity": 0.3, "calibration": str(text_file), "num_samples": 4, "seq_len": 32}
        prune(source, Recipe.build(**settings, multiple_of=1, dtype="float32"), tmp_path / f"out-{name}")
        shards = sorted((tmp_path / f"out-{name}").glob("*.safetensors"))
        outputs.append({key: tensor for path in shards for key, tensor in load_file(path).items()})
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = outputs
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {dtype}
    assert ("lm_head.weight" in one) is not tied
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out-one", dtype=dtype)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied


def test_the_sparse_file_is_what_it_says(large: Path) -> None:
    with safe_open(large / SINGLE_NAME, framework="pt") as handle:
        assert torch.equal(handle.get_tensor("model.layers.29.input_layernorm.weight"), torch.ones(128))
        assert handle.get_slice("model.layers.0.mlp.down_proj.weight")[:2].abs().max() == 0
    assert (large / SINGLE_NAME).stat().st_blocks * 512 < 2 * MIB
