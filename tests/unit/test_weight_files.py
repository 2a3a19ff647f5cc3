"""Weight files from shards: the bytes of the library and of transformers, limits, and a cut in the middle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from structprune.checkpoint.weight_files import stored_tensors
from structprune.checkpoint.writer import CheckpointWriter
from structprune.errors import CheckpointError
from support.models import save_tiny


def shards(folder: Path, *contents: dict[str, Tensor]) -> CheckpointWriter:
    folder.mkdir(exist_ok=True)
    writer = CheckpointWriter(folder, len(contents))
    for number, tensors in enumerate(contents, start=1):
        writer.write(number, tensors)
    return writer


def blocks(count: int, numbers: int = 100) -> list[dict[str, Tensor]]:
    """One tensor of 4 * `numbers` bytes per shard."""
    generator = torch.Generator().manual_seed(1)
    return [{f"layers.{index}.weight": torch.randn(numbers, generator=generator)} for index in range(count)]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("model*")}


def test_one_file_has_the_bytes_of_the_library(tmp_path: Path) -> None:
    """Mixed dtypes, an empty tensor, a scalar, and a name that JSON must escape."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "z.weight": torch.randn(5, 3, generator=generator),
        "a.half": torch.randn(7, generator=generator).to(torch.float16),
        "a.brain": torch.randn(3, generator=generator).to(torch.bfloat16),
        "m.double": torch.randn(2, 2, generator=generator).double(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        'a "name" \u00e9 \\': torch.ones(1),
    }
    names = list(tensors)
    writer = shards(tmp_path / "shards", *({name: tensors[name] for name in names[i::3]} for i in range(3)))
    files = writer.weight_files(10**9)
    files.write(tmp_path)
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / SINGLE_NAME).read_bytes() == (tmp_path / "expected").read_bytes()
    assert files.num_bytes == (tmp_path / "expected").stat().st_size
    assert not (tmp_path / INDEX_NAME).exists()


@pytest.mark.parametrize("kind", ["llama", "llama-untied-biased", "opt"])
def test_one_file_has_the_bytes_of_save_pretrained(kind: str, tmp_path: Path) -> None:
    """A tied head is stored once, as transformers does."""
    source = save_tiny(kind, tmp_path / "source")
    reader = CheckpointReader(source)
    names = sorted(reader.shapes)
    writer = shards(tmp_path / "shards", *(reader.read(names[i::4]) for i in range(4)))
    writer.weight_files(10**9).write(tmp_path)
    assert (tmp_path / SINGLE_NAME).read_bytes() == (source / SINGLE_NAME).read_bytes()


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (1200, [1200]),
        (1201, [1200]),
        (1199, [800, 400]),
        (800, [800, 400]),
        (799, [400, 400, 400]),
        (400, [400, 400, 400]),
        # No tensor is cut: each has a file of its own.
        (399, [400, 400, 400]),
        (1, [400, 400, 400]),
    ],
)
def test_sizes_around_the_limit(limit: int, sizes: list[int], tmp_path: Path) -> None:
    expected = {name: tensor for tensors in blocks(3) for name, tensor in tensors.items()}
    shards(tmp_path / "shards", *blocks(3)).weight_files(limit).write(tmp_path)
    paths = sorted(tmp_path.glob("*.safetensors"))
    numbered = [f"model-{number:05d}-of-{len(sizes):05d}.safetensors" for number in range(1, len(sizes) + 1)]
    assert [path.name for path in paths] == (numbered if len(sizes) > 1 else [SINGLE_NAME])
    assert [sum(t.numel() * t.element_size() for t in load_file(path).values()) for path in paths] == sizes
    assert (tmp_path / INDEX_NAME).exists() == (len(sizes) > 1)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    found = CheckpointReader(tmp_path).read(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    contents = [{"embed": torch.ones(10)}, {"layers.0": torch.ones(500)}, {"norm": torch.ones(20)}]
    shards(tmp_path / "shards", *contents).weight_files(1000).write(tmp_path)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_parameters": 530, "total_size": 2120}
    by_file: dict[str, list[str]] = {}
    for name, file in index["weight_map"].items():
        by_file.setdefault(file, []).append(name)
    assert sorted(by_file.values()) == [["embed", "norm"], ["layers.0"]]


@pytest.mark.parametrize("kind", ["llama", "llama-untied-biased"])
def test_stock_code_loads_several_files_and_writes_the_same_index(kind: str, tmp_path: Path) -> None:
    source = save_tiny(kind, tmp_path / "source")
    reader = CheckpointReader(source)
    output = tmp_path / "out"
    output.mkdir()
    names = sorted(reader.shapes)
    shards(tmp_path / "shards", *(reader.read([name]) for name in names)).weight_files(20_000).write(output)
    (output / "config.json").write_bytes((source / "config.json").read_bytes())
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path / "stock", max_shard_size=20_000)
    ours, stock = (json.loads((folder / INDEX_NAME).read_text()) for folder in (output, tmp_path / "stock"))
    assert ours["metadata"] == stock["metadata"]
    assert list(ours["weight_map"]) == list(stock["weight_map"])


def test_what_a_cut_left_is_written_over(tmp_path: Path) -> None:
    """An error in the second file: no index yet, and the same files afterwards."""
    writer = shards(tmp_path / "shards", *blocks(3))
    writer.weight_files(400).write(tmp_path)
    whole = content(tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    second = writer.path(2)
    complete = second.read_bytes()
    second.write_bytes(complete[:-4])
    with pytest.raises(CheckpointError, match="the shard is shorter than its header says") as caught:
        writer.weight_files(400).write(tmp_path)
    assert caught.value.where == str(second)
    assert list(content(tmp_path)) == ["model-00001-of-00003.safetensors"]
    second.write_bytes(complete)
    writer.weight_files(400).write(tmp_path)
    assert content(tmp_path) == whole


def test_withdrawn_files_do_not_load(tmp_path: Path) -> None:
    for limit in (10**9, 400):
        directory = tmp_path / str(limit)
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        files = shards(tmp_path / "shards", *blocks(2)).weight_files(limit)
        files.write(directory)
        files.withdraw(directory)
        with pytest.raises(CheckpointError, match=r"no safetensors weights found|the weight files have no index"):
            CheckpointReader(directory)


def test_the_order_of_bytes_is_read_back(tmp_path: Path) -> None:
    tensors = {name: torch.full((2,), float(number)) for number, name in enumerate("dbca")}
    save_file(tensors, tmp_path / "one.safetensors")
    found = stored_tensors(tmp_path / "one.safetensors")
    assert [tensor.name for tensor in found] == ["a", "b", "c", "d"]
    data = (tmp_path / "one.safetensors").read_bytes()
    for tensor in found:
        values = torch.frombuffer(bytearray(data[tensor.start : tensor.start + tensor.num_bytes]), dtype=torch.float32)
        assert torch.equal(values, tensors[tensor.name])
