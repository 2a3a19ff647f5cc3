"""The checkpoint writer: a run's shards, each whole or not there, counted whoever wrote them."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.writer import CheckpointWriter, FileForm, ModelWriter
from structprune.errors import CheckpointError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "shards").mkdir()
    return tmp_path


def tensors_of_shards() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"embed.weight": torch.randn(10, 4, generator=generator)},
        {
            "layers.0.up.weight": torch.randn(6, 4, generator=generator).to(torch.bfloat16),
            "layers.0.up.bias": torch.randn(6, generator=generator).to(torch.float16),
        },
        {"norm.weight": torch.randn(4, generator=generator, dtype=torch.float64)},
    ]


@pytest.mark.parametrize("limit", [10**9, 100])
def test_round_trip(limit: int, directory: Path) -> None:
    writer = CheckpointWriter(directory / "shards", 3)
    for number, tensors in enumerate(tensors_of_shards(), start=1):
        writer.write(number, tensors)
    files = writer.weight_files(limit)
    files.write(directory)
    expected = {name: tensor for tensors in tensors_of_shards() for name, tensor in tensors.items()}
    reader = CheckpointReader(directory)
    tensors = reader.read(expected)
    assert set(reader.shapes) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert writer.num_parameters == files.num_parameters == 40 + 24 + 6 + 4
    assert files.num_bytes == reader.file_bytes == sum(p.stat().st_size for p in directory.glob("*.safetensors"))


def test_nothing_loads_before_the_weight_files(directory: Path) -> None:
    writer = CheckpointWriter(directory / "shards", 3)
    (directory / "shards" / "config.json").write_text("{}", encoding="utf-8")
    for number, tensors in enumerate(tensors_of_shards(), start=1):
        writer.write(number, tensors)
        for folder in (directory, directory / "shards"):
            with pytest.raises(CheckpointError, match=r"no safetensors weights found|the weight files have no index"):
                CheckpointReader(folder)


def test_shards_can_be_written_in_any_order(directory: Path) -> None:
    contents: list[bytes] = []
    for order in ((2, 3, 1), (1, 2, 3)):
        writer = CheckpointWriter(directory / "shards", 3)
        for number in order:
            writer.write(number, tensors_of_shards()[number - 1])
        writer.weight_files(10**9).write(directory)
        contents.append((directory / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_a_shard_of_an_earlier_process_counts(directory: Path) -> None:
    first = CheckpointWriter(directory / "shards", 3)
    for number in (1, 2):
        first.write(number, tensors_of_shards()[number - 1])
    second = CheckpointWriter(directory / "shards", 3)
    second.adopt(1)
    second.adopt(2)
    second.write(3, tensors_of_shards()[2])
    assert second.num_parameters == 40 + 24 + 6 + 4


def test_names_of_a_checkpoint_that_calls_them_otherwise(directory: Path) -> None:
    writer = CheckpointWriter(directory / "shards", 1, FileForm(name=lambda name: f"old.{name}"))
    path = writer.write(1, {"a": torch.ones(2), "b": torch.zeros(2)})
    assert set(load_file(path)) == {"old.a", "old.b"}
    assert torch.equal(writer.read(1, ["a"])["a"], torch.ones(2))


def test_views_are_written_as_they_look(directory: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    writer = CheckpointWriter(directory / "shards", 1)
    writer.write(1, {"transposed": weight.T, "columns": weight[:, 1:3], "copy": weight.clone()})
    writer.weight_files(10**9).write(directory)
    tensors = CheckpointReader(directory).read(["transposed", "columns"])
    assert torch.equal(tensors["transposed"], weight.T)
    assert torch.equal(tensors["columns"], weight[:, 1:3])


def test_failed_shard_leaves_nothing(directory: Path) -> None:
    weight = torch.ones(3)
    writer = CheckpointWriter(directory / "shards", 1)
    with pytest.raises(RuntimeError, match="share memory"):
        writer.write(1, {"a": weight, "b": weight})
    assert not list((directory / "shards").iterdir())
    assert writer.num_parameters == 0


def test_shards_are_removed_and_nothing_else(directory: Path) -> None:
    writer = CheckpointWriter(directory / "shards", 3)
    writer.write(2, tensors_of_shards()[1])
    (directory / "shards" / "mine").write_text("kept")
    CheckpointWriter(directory / "shards", 3).remove()
    assert [path.name for path in (directory / "shards").iterdir()] == ["mine"]


def test_weights_are_as_readable_as_the_rest(directory: Path) -> None:
    writer = CheckpointWriter(directory / "shards", 1)
    shard = writer.write(1, {"a": torch.ones(2)})
    writer.weight_files(10**9).write(directory)
    paths = (shard, directory / "model.safetensors", directory / "config.json")
    assert len({stat.S_IMODE(path.stat().st_mode) for path in paths}) == 1


def model_writer(directory: Path) -> ModelWriter:
    return ModelWriter(directory, 2, "layers", FileForm(name=lambda name: name.replace("layers", "h")))


def test_blocks_are_written_read_and_adopted_by_their_index(directory: Path) -> None:
    writer = model_writer(directory)
    written = [
        writer.write_block(1, {"up.weight": torch.ones(6)}),
        writer.write_embeddings({"embed.weight": torch.ones(10)}),
        writer.write_block(0, {"up.weight": torch.zeros(5)}),
        writer.write_rest({"norm.weight": torch.ones(4)}),
    ]
    assert [path.name for path in written] == [f"shard-0000{number}.safetensors" for number in (3, 1, 2, 4)]
    assert all(path.is_file() for path in written)
    assert torch.equal(writer.read_block(1, ["up.weight"])["up.weight"], torch.ones(6))
    assert (writer.num_block_parameters, writer.num_parameters) == (11, 25)
    files = writer.weight_files(10**9)
    (places,) = (file.tensors for file in files.files)
    assert {tensor.name: tensor.path for tensor in places}["h.1.up.weight"] == written[0]

    adopted = model_writer(directory)
    adopted.adopt_embeddings()
    adopted.adopt_block(0)
    assert (adopted.num_block_parameters, adopted.num_parameters) == (5, 15)
    adopted.adopt_block(1)
    adopted.write_rest({"norm.weight": torch.ones(4)})
    assert adopted.weight_files(10**9) == files
