"""The checkpoint writer: a round trip, the hub's file names, and an index that comes last."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from structprune.checkpoint.reader import INDEX_NAME, CheckpointReader
from structprune.checkpoint.writer import CheckpointWriter, ModelWriter
from structprune.errors import CheckpointError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    return tmp_path


def shards() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"embed.weight": torch.randn(10, 4, generator=generator)},
        {
            "layers.0.up.weight": torch.randn(6, 4, generator=generator).to(torch.bfloat16),
            "layers.0.up.bias": torch.randn(6, generator=generator).to(torch.float16),
        },
        {"norm.weight": torch.randn(4, generator=generator, dtype=torch.float64)},
    ]


def test_round_trip(directory: Path) -> None:
    writer = CheckpointWriter(directory, 3)
    for number, tensors in enumerate(shards(), start=1):
        writer.write(number, tensors)
    writer.finish()
    expected = {name: tensor for tensors in shards() for name, tensor in tensors.items()}
    reader = CheckpointReader(directory)
    tensors = reader.read(expected)
    assert set(reader.shapes) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert writer.num_parameters == 40 + 24 + 6 + 4
    assert writer.file_bytes == reader.file_bytes == sum(p.stat().st_size for p in directory.glob("*.safetensors"))


def test_index_is_written_by_finish_alone(directory: Path) -> None:
    writer = CheckpointWriter(directory, 3)
    for number, tensors in enumerate(shards(), start=1):
        writer.write(number, tensors)
        assert not (directory / INDEX_NAME).exists()
        with pytest.raises(CheckpointError, match="no safetensors weights found"):
            CheckpointReader(directory)
    writer.finish()
    index = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))
    total = sum(t.numel() * t.element_size() for tensors in shards() for t in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"] == {
        "embed.weight": "model-00001-of-00003.safetensors",
        "layers.0.up.bias": "model-00002-of-00003.safetensors",
        "layers.0.up.weight": "model-00002-of-00003.safetensors",
        "norm.weight": "model-00003-of-00003.safetensors",
    }


def test_names(directory: Path) -> None:
    writer = CheckpointWriter(directory, 34)
    assert writer.shard_name(7) == "model-00007-of-00034.safetensors"
    assert writer.write(34, {"a": torch.ones(2)}) == "model-00034-of-00034.safetensors"
    assert [p.name for p in directory.glob("*.safetensors")] == ["model-00034-of-00034.safetensors"]


def test_shards_can_be_written_in_any_order(directory: Path) -> None:
    writer = CheckpointWriter(directory, 3)
    for number in (2, 3, 1):
        writer.write(number, shards()[number - 1])
    writer.finish()
    name = "norm.weight"
    assert torch.equal(CheckpointReader(directory).read([name])[name], shards()[2][name])


def test_views_are_written_as_they_look(directory: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    writer = CheckpointWriter(directory, 1)
    writer.write(1, {"transposed": weight.T, "columns": weight[:, 1:3], "copy": weight.clone()})
    writer.finish()
    tensors = CheckpointReader(directory).read(["transposed", "columns"])
    assert torch.equal(tensors["transposed"], weight.T)
    assert torch.equal(tensors["columns"], weight[:, 1:3])


def test_failed_shard_leaves_nothing(directory: Path) -> None:
    weight = torch.ones(3)
    writer = CheckpointWriter(directory, 1)
    with pytest.raises(RuntimeError, match="share memory"):
        writer.write(1, {"a": weight, "b": weight})
    assert [p.name for p in directory.iterdir()] == ["config.json"]
    assert (writer.num_parameters, writer.file_bytes) == (0, 0)


def test_stock_code_sees_the_format(directory: Path) -> None:
    """transformers refuses shards whose metadata does not say `pt`."""
    CheckpointWriter(directory, 1).write(1, {"a": torch.ones(2)})
    content = (directory / "model-00001-of-00001.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def test_shards_are_as_readable_as_the_rest(directory: Path) -> None:
    writer = CheckpointWriter(directory, 1)
    name = writer.write(1, {"a": torch.ones(2)})
    writer.finish()
    modes = {stat.S_IMODE((directory / file_name).stat().st_mode) for file_name in (name, INDEX_NAME)}
    assert len(modes) == 1


def model_writer(directory: Path) -> ModelWriter:
    return ModelWriter(directory, 2, "layers", stored_name=lambda name: name.replace("layers", "h"))


def test_blocks_are_written_read_and_adopted_by_their_index(directory: Path) -> None:
    writer = model_writer(directory)
    written = [
        writer.write_block(1, {"up.weight": torch.ones(6)}),
        writer.write_embeddings({"embed.weight": torch.ones(10)}),
        writer.write_block(0, {"up.weight": torch.zeros(5)}),
        writer.write_rest({"norm.weight": torch.ones(4)}),
    ]
    assert [path.name[6:11] for path in written] == ["00003", "00001", "00002", "00004"]
    assert all(path.is_file() and path.name.endswith("-of-00004.safetensors") for path in written)
    assert torch.equal(writer.read_block(1, ["up.weight"])["up.weight"], torch.ones(6))
    assert (writer.num_block_parameters, writer.num_parameters) == (11, 25)
    writer.finish()
    index = (directory / INDEX_NAME).read_bytes()
    assert json.loads(index)["weight_map"]["h.1.up.weight"] == written[0].name

    adopted = model_writer(directory)
    adopted.adopt_embeddings()
    adopted.adopt_block(0)
    assert (adopted.num_block_parameters, adopted.num_parameters) == (5, 15)
    adopted.adopt_block(1)
    adopted.write_rest({"norm.weight": torch.ones(4)})
    adopted.finish()
    assert (directory / INDEX_NAME).read_bytes() == index
