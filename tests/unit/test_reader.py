"""The checkpoint reader: one or many shards, damaged and hostile directories, private and finite tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from structprune.checkpoint import reader as reader_module
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.shards import INDEX_NAME, SINGLE_NAME
from structprune.errors import CheckpointError, NumericalError
from support.models import save_tiny

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def sharded_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA in several shards. Do not modify: copy it."""
    return save_tiny("llama", tmp_path_factory.mktemp("sharded") / "llama", max_shard_size="20KB")


def write_single(directory: Path, **tensors: Tensor) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    save_file(tensors, directory / SINGLE_NAME)
    return directory


def write_sharded(directory: Path, shards: dict[str, dict[str, Tensor]]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    for file_name, tensors in shards.items():
        save_file(tensors, directory / file_name)
    write_index(directory, {name: file_name for file_name, tensors in shards.items() for name in tensors})
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


@pytest.mark.parametrize("kind", ["tiny_llama", "sharded_llama"])
def test_reads_what_stock_code_saved(kind: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(kind)
    num_files = len(list(directory.glob("*.safetensors")))
    assert (num_files == 1) == (kind == "tiny_llama")
    reader = CheckpointReader(directory)
    expected = dict(AutoModelForCausalLM.from_pretrained(directory).named_parameters())
    assert set(reader.shapes) == set(expected)
    tensors = reader.read(reader.shapes)
    for name, parameter in expected.items():
        assert reader.shapes[name] == tuple(parameter.shape)
        assert reader.dtypes[name] == torch.float32
        assert torch.equal(tensors[name], parameter)
    assert reader.num_bytes(expected) == sum(4 * p.numel() for p in expected.values())
    # Headers come on top of the tensors.
    assert reader.num_bytes(expected) < reader.file_bytes < reader.num_bytes(expected) + 4096 * num_files


def test_shards_and_one_file_hold_the_same(tiny_llama: Path, sharded_llama: Path) -> None:
    one, many = CheckpointReader(tiny_llama), CheckpointReader(sharded_llama)
    assert one.shapes == many.shapes
    a, b = one.read(one.shapes), many.read(one.shapes)
    assert all(torch.equal(a[name], b[name]) for name in one.shapes)


def test_prefix_is_added_and_left_out_of_the_result(sharded_llama: Path) -> None:
    reader = CheckpointReader(sharded_llama)
    prefix = "model.layers.1."
    names = [n.removeprefix(prefix) for n in reader.shapes if n.startswith(prefix)]
    tensors = reader.read(names, prefix)
    assert set(tensors) == set(names)
    full = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(tensors["mlp.up_proj.weight"], reader.read([full])[full])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 3).to(dtype)
    reader = CheckpointReader(write_single(tmp_path, weight=weight))
    read = reader.read(["weight"])["weight"]
    assert reader.dtypes["weight"] == read.dtype == dtype
    assert torch.equal(read, weight)
    assert reader.num_bytes(["weight"]) == 15 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_quantised_and_integer_tensors_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    write_single(tmp_path, weight=torch.ones(4, 4).to(dtype))
    with pytest.raises(CheckpointError, match="tensor 'weight' is stored quantised or as integers"):
        CheckpointReader(tmp_path)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    reader = CheckpointReader(write_single(tmp_path, scalar=torch.tensor(2.5), empty=torch.empty(0, 3)))
    tensors = reader.read(["scalar", "empty"])
    assert tensors["scalar"] == 2.5
    assert tensors["empty"].shape == (0, 3)


@pytest.mark.parametrize("shape", [(1000, 7), (7, 1000), (3, 5, 400), (5001,), (1, 4000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensor_is_read_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(reader_module, "_CHUNK_BYTES", 1500)
    weight = torch.arange(torch.Size(shape).numel()).reshape(shape).remainder(251).to(dtype)
    chunks = reader_module._row_chunks(weight.shape, dtype.itemsize)
    assert len(chunks) > 1 or shape[0] == 1
    assert [row for start, stop in chunks for row in range(start, stop or shape[0])] == list(range(shape[0]))
    row_bytes = weight[0].numel() * dtype.itemsize
    assert all((stop - start) * row_bytes <= max(1500, row_bytes) for start, stop in chunks if stop is not None)
    reader = CheckpointReader(write_single(tmp_path, before=torch.ones(3), weight=weight, zlast=torch.zeros(2)))
    tensors = reader.read(["before", "weight", "zlast"])
    assert torch.equal(tensors["weight"], weight)
    assert torch.equal(tensors["before"], torch.ones(3))
    assert torch.equal(tensors["zlast"], torch.zeros(2))


@pytest.mark.parametrize("chunk_bytes", [2**24, 64])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype_is_cast_to_as_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stored: torch.dtype, chunk_bytes: int
) -> None:
    monkeypatch.setattr(reader_module, "_CHUNK_BYTES", chunk_bytes)
    weight = torch.linspace(-3, 3, 40 * 9).reshape(40, 9).to(stored)
    reader = CheckpointReader(write_single(tmp_path, weight=weight, scalar=torch.tensor(2.5, dtype=stored)))
    found = reader.read(["weight", "scalar"], dtype=dtype)
    assert found["weight"].dtype == found["scalar"].dtype == dtype
    assert torch.equal(found["weight"], weight.to(dtype))
    assert found["scalar"] == 2.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_an_error_that_names_the_tensor(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    weight = torch.ones(40, 9).to(dtype)
    weight[17, 3] = bad
    reader = CheckpointReader(write_single(tmp_path, good=torch.ones(3), weight=weight))
    assert torch.equal(reader.read(["good"])["good"], torch.ones(3))
    with pytest.raises(NumericalError, match="tensor 'weight' holds NaN or infinity") as caught:
        reader.read(["good", "weight"])
    assert caught.value.where == str(tmp_path / SINGLE_NAME)


@pytest.mark.parametrize("chunk_bytes", [2**24, 64])
def test_tensors_are_private_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(reader_module, "_CHUNK_BYTES", chunk_bytes)
    weight = torch.randn(20, 10)
    reader = CheckpointReader(write_single(tmp_path, weight=weight))
    digest = hashlib.sha256((tmp_path / SINGLE_NAME).read_bytes()).digest()
    first = reader.read(["weight"])["weight"]
    first.zero_()
    assert torch.equal(reader.read(["weight"])["weight"], weight)
    assert hashlib.sha256((tmp_path / SINGLE_NAME).read_bytes()).digest() == digest


def test_missing_tensor(tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks tensor 'model\.layers\.9\.x'"):
        CheckpointReader(tiny_llama).read(["x"], "model.layers.9.")


def test_missing_shard(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a.safetensors": {"a": torch.ones(2)}, "b.safetensors": {"b": torch.ones(2)}})
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a shard that the index names is missing") as caught:
        CheckpointReader(tmp_path)
    assert caught.value.where == str(tmp_path / "b.safetensors")


@pytest.mark.parametrize("size", [0, 4, 20, -1])
@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_shard(tmp_path: Path, size: int, sharded: bool) -> None:
    tensors = {"a": torch.ones(100)}
    if sharded:
        write_sharded(tmp_path, {"x.safetensors": tensors})
    else:
        write_single(tmp_path, **tensors)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="truncated or not safetensors") as caught:
        CheckpointReader(tmp_path)
    assert caught.value.where == str(path)


def test_header_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    write_single(tmp_path, a=torch.ones(4))
    content = (tmp_path / SINGLE_NAME).read_bytes()
    (tmp_path / SINGLE_NAME).write_bytes((2**62).to_bytes(8, "little") + content[8:])
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/x.safetensors", "..", ".", "", None, 3, ["x"], "ABSOLUTE"])
def test_index_may_not_leave_the_directory(tmp_path: Path, name: Any) -> None:
    directory = write_sharded(tmp_path / "model", {"a.safetensors": {"a": torch.ones(2)}})
    (directory / "sub").mkdir()
    for outside in (tmp_path / "x.safetensors", directory / "sub" / "x.safetensors"):
        save_file({"a": torch.ones(2)}, outside)
    write_index(directory, {"a": str(tmp_path / "x.safetensors") if name == "ABSOLUTE" else name})
    with pytest.raises(CheckpointError, match="names a shard outside its directory") as caught:
        CheckpointReader(directory)
    assert caught.value.where == str(directory / INDEX_NAME)


def test_index_places_a_tensor_where_it_is_not(tmp_path: Path) -> None:
    """As for stock code: the shards say what they hold, and what the index invents is not there."""
    write_sharded(tmp_path, {"a.safetensors": {"a": torch.ones(2)}, "b.safetensors": {"b": torch.ones(2)}})
    write_index(tmp_path, {"a": "a.safetensors", "b": "a.safetensors"})
    reader = CheckpointReader(tmp_path)
    assert reader.shapes == {"a": (2,)}
    assert reader.notes == (f"{INDEX_NAME} names 1 tensor(s) that no shard holds, such as b",)


def test_index_leaves_out_a_tensor(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a.safetensors": {"a": torch.ones(2), "b": torch.full((2,), 2.0)}})
    write_index(tmp_path, {"a": "a.safetensors"})
    reader = CheckpointReader(tmp_path)
    assert reader.read(["b"])["b"].tolist() == [2.0, 2.0]
    assert reader.notes == (f"{INDEX_NAME} leaves out 1 tensor(s) of its shards, such as b",)


def test_two_shards_hold_a_tensor(tmp_path: Path) -> None:
    """The index says which one counts; where it does not, neither does."""
    shards = {"a.safetensors": {"a": torch.ones(2), "b": torch.ones(2)}, "b.safetensors": {"b": torch.zeros(2)}}
    write_sharded(tmp_path, shards)
    write_index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    assert CheckpointReader(tmp_path).read(["b"])["b"].tolist() == [0.0, 0.0]
    write_index(tmp_path, {"a": "a.safetensors", "c": "b.safetensors"})
    with pytest.raises(CheckpointError, match="two shards hold tensor 'b'"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[]", "{", ""])
def test_unusable_index(tmp_path: Path, text: str) -> None:
    write_sharded(tmp_path, {"a.safetensors": {"a": torch.ones(2)}})
    (tmp_path / INDEX_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(tmp_path)
    assert caught.value.where == str(tmp_path / INDEX_NAME)


def test_prefers_the_file_that_stock_code_prefers(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a.safetensors": {"a": torch.zeros(2)}})
    write_single(tmp_path, a=torch.ones(2))
    assert torch.equal(CheckpointReader(tmp_path).read(["a"])["a"], torch.ones(2))


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"no safetensors weights found; got pytorch_model\.bin") as caught:
        CheckpointReader(tmp_path)
    assert "pickles are never loaded" in str(caught.value)


def test_pickled_shard_in_the_index_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    write_index(tmp_path, {"a": "pytorch_model.bin"})
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        CheckpointReader(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="no safetensors weights found; got none"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("text", ["{", "", "NOT JSON", "[" * 100_000])
def test_config_that_is_not_json(tmp_path: Path, text: str) -> None:
    write_single(tmp_path, a=torch.ones(2))
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: the file cannot be read as JSON"):
        CheckpointReader(tmp_path)


def test_config_that_is_not_text(tmp_path: Path) -> None:
    write_single(tmp_path, a=torch.ones(2))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"config\.json: the file cannot be read as JSON"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("text", ['["llama"]', "3", "null"])
def test_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    write_single(tmp_path, a=torch.ones(2))
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not hold a JSON object"):
        CheckpointReader(tmp_path)


def test_config_that_is_missing(tmp_path: Path) -> None:
    write_single(tmp_path, a=torch.ones(2))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: the file is missing"):
        CheckpointReader(tmp_path)


def test_fingerprint(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    one = CheckpointReader(write_single(tmp_path / "one", **tensors)).fingerprint()
    assert CheckpointReader(write_single(tmp_path / "two", **tensors)).fingerprint() == one
    other = [
        write_single(tmp_path / "shape", a=torch.ones(3, 2), b=torch.ones(4)),
        write_single(tmp_path / "dtype", a=torch.ones(2, 3), b=torch.ones(4).half()),
        write_single(tmp_path / "name", a=torch.ones(2, 3), c=torch.ones(4)),
        write_single(tmp_path / "config", **tensors),
    ]
    (tmp_path / "config" / "config.json").write_text("{}", encoding="utf-8")
    assert one not in {CheckpointReader(directory).fingerprint() for directory in other}


def test_other_names(tmp_path: Path) -> None:
    tensors = {"h.0.weight": torch.ones(2), "head.weight": torch.zeros(3)}
    reader = CheckpointReader(write_single(tmp_path / "model", **tensors))
    view = reader.renamed({"head.": "lm_head.", "": "model."})
    assert set(view.shapes) == {"model.h.0.weight", "lm_head.weight"}
    assert view.read(["weight"], "model.h.0.")["weight"].tolist() == [1, 1]
    assert next(view.read_rows("lm_head.weight", 3))[1].tolist() == [0, 0, 0]
    assert (view.stored_name("model.h.7.bias"), view.stored_name("lm_head.weight")) == ("h.7.bias", "head.weight")
    assert view.fingerprint() == reader.fingerprint()
    assert set(reader.shapes) == set(tensors)


def test_masks_of_bytes_are_left_out(tmp_path: Path) -> None:
    masks = {"h.0.attn.bias": torch.ones(1, 1, 2, 2, dtype=torch.bool)}
    reader = CheckpointReader(write_single(tmp_path / "model", weight=torch.ones(2), **masks))
    assert set(reader.shapes) == {"weight"}


def test_shard_larger_than_memory_has_its_headers_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch maps files as private memory, which systems refuse beyond their own; numpy's mapping they do not count."""
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    def refuse(path: str, framework: str) -> Any:
        if framework == "pt":
            raise RuntimeError(f"unable to mmap 25707028920 bytes from file <{path}>: Cannot allocate memory (12)")
        return safe_open(path, framework=framework)

    monkeypatch.setattr("structprune.checkpoint.shards.safe_open", refuse)
    reader = CheckpointReader(tmp_path)
    assert reader.shapes == {"a": (3,)}
    with pytest.raises(CheckpointError, match="cannot be mapped into memory; got unable to mmap 25707028920 bytes"):
        reader.read(["a"])
