"""Programs of torch.export.save read as data: the same numbers as torch's own loader, and nothing of a file is run."""

from __future__ import annotations

import io
import json
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprune.errors import CheckpointError, InputError, StructPruneError, UnsupportedError
from structprune.modules.compare import tensors_of
from structprune.modules.exported import load_exported
from support.networks import Mixed, ResNet, Shared, small_bert, small_vit, small_whisper

WEIGHTS, GRAPH = "data/weights/model_weights_config.json", "models/model.json"


class Split(nn.Module):
    """Several results of one operation, infinite numbers, a type of numbers, a tensor as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = self.map(x).chunk(2, -1)
        masked = torch.full_like(first, float("-inf")).triu(1).softmax(-1) + torch.tensor([1.0, 2.0, 3.0])
        values, places = second.topk(2)
        return (first * scale).to(torch.float64), {"masked": masked, "values": values, "places": places}


def save(module: nn.Module, path: Path, *args: Tensor, **kwargs: Any) -> torch.export.ExportedProgram:
    program = torch.export.export(module.eval(), args, kwargs, strict=False)
    torch.export.save(program, path)
    return program


@pytest.mark.parametrize(
    ("make", "args", "kwargs"),
    [
        (Split, (torch.randn(2, 3, 6),), {"scale": torch.randn(3)}),
        (ResNet, (torch.randn(2, 3, 16, 16),), {}),
        (Mixed, (torch.randn(2, 3, 8, 8),), {}),
        (Shared, (torch.randint(0, 11, (2, 5)),), {}),
        (small_vit, (), {"pixel_values": torch.randn(3, 3, 16, 16)}),
        (small_bert, (), {"input_ids": torch.randint(3, 20, (2, 7)), "attention_mask": torch.ones(2, 7).long()}),
        (
            small_whisper,
            (),
            {
                "input_features": torch.randn(2, 10, 40),
                "decoder_input_ids": torch.randint(3, 60, (2, 6)),
                "use_cache": False,
            },
        ),
    ],
)
def test_computes_what_the_program_computes(
    make: Callable[[], nn.Module], args: tuple[Tensor, ...], kwargs: dict[str, Any], tmp_path: Path
) -> None:
    module = make()
    program = save(module, tmp_path / "x.pt2", *args, **kwargs)
    read = load_exported(tmp_path / "x.pt2")
    given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    assert list(read.sizes.values()) == [tuple(each.shape) for each in given]
    with torch.no_grad():
        found = read(**dict(zip(read.sizes, given, strict=True)))
        wanted = tensors_of(program.module()(*args, **kwargs))
    assert all(map(torch.equal, found, wanted))
    assert len(found) == len(wanted)
    assert {name: tuple(each.shape) for name, each in read.named_parameters()} == {
        name: tuple(each.shape) for name, each in module.named_parameters()
    }
    with pytest.raises(InputError, match="other inputs"):
        read()


class Evil:
    """A pickle of it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def changed(source: Path, target: Path, name: str, change: Callable[[bytes], bytes] | None, packed: int = 0) -> Path:
    """Copy a program with one part changed, added (a name that it has not), or left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", packed) as new:
        (root,) = {each.partition("/")[0] for each in old.namelist()}
        parts = {each: old.read(each) for each in old.namelist()}
        full = f"{root}/{name}"
        if change is not None:
            parts[full] = change(parts.get(full, b""))
        else:
            del parts[full]
        for each, content in parts.items():
            new.writestr(each, content)
    return target


def edited(edit: Callable[[Any], object]) -> Callable[[bytes], bytes]:
    """Change a part that is JSON in place."""

    def change(content: bytes) -> bytes:
        data = json.loads(content)
        edit(data)
        return json.dumps(data).encode()

    return change


def weight(**values: Any) -> Callable[[bytes], bytes]:
    """Change what the file says of one weight."""

    def edit(data: Any) -> None:
        entry = data["config"]["head.weight"]
        for name, value in values.items():
            (entry if name in entry else entry["tensor_meta"])[name] = value

    return edited(edit)


def node(**values: Any) -> Callable[[bytes], bytes]:
    """Change the first operation of the graph."""
    return edited(lambda data: data["graph_module"]["graph"]["nodes"][0].update(values))


def size(number: Any) -> list[dict[str, Any]]:
    return [{"as_int": 10}, number]


HOSTILE: dict[str, tuple[str, Callable[[bytes], bytes] | None, type[StructPruneError], str]] = {
    "a pickled weight": (WEIGHTS, weight(use_pickle=True), UnsupportedError, "unpickled"),
    "a pickled constant": ("data/constants/opaque_obj_0", lambda _: b"", UnsupportedError, "unpickled"),
    "weights of old": ("data/weights/model.pt", lambda _: b"", UnsupportedError, "unpickled"),
    "a compiled library": ("data/aotinductor/model/x.so", lambda _: b"", UnsupportedError, "run or unpickled"),
    "sizes larger than the data": (WEIGHTS, weight(sizes=size({"as_int": 10**9})), CheckpointError, "other sizes"),
    "negative strides": (WEIGHTS, weight(strides=size({"as_int": -1})), CheckpointError, "other sizes"),
    "an axis without data": (
        WEIGHTS,
        weight(sizes=size({"as_int": 10**9}), strides=size({"as_int": 0})),
        CheckpointError,
        "repeats its data",
    ),
    "a size that is an expression": (
        WEIGHTS,
        weight(sizes=size({"as_expr": {"expr_str": "__import__('os').system('true')"}})),
        UnsupportedError,
        "not fixed",
    ),
    "numbers of no type": (WEIGHTS, weight(dtype=99), UnsupportedError, "type 99"),
    "no data": ("data/weights/weight_0", None, CheckpointError, "other sizes"),
    "a function of torch": (GRAPH, node(target="torch.load"), UnsupportedError, "torch.load"),
    "a file as a tensor": (GRAPH, node(target="torch.ops.aten.from_file.default"), UnsupportedError, "from_file"),
    "an operation of others": (GRAPH, node(target="torch.ops.evil.run.default"), UnsupportedError, "evil"),
    "an operation that changes": (GRAPH, node(target="torch.ops.aten.set_.source_Tensor"), UnsupportedError, "set_"),
    "no graph": (GRAPH, lambda _: b"{}", CheckpointError, "can be read"),
    "a graph without end": (GRAPH, lambda _: b"[" * 100_000, CheckpointError, "can be read"),
    "another version": ("archive_version", lambda _: b"7", UnsupportedError, "version"),
    "no description": (WEIGHTS, None, CheckpointError, "lacks a part"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small program. Do not modify."""
    path = tmp_path_factory.mktemp("program") / "x.pt2"
    save(ResNet(), path, torch.randn(2, 3, 16, 16))
    return path


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_programs_are_refused(name: str, program: Path, tmp_path: Path) -> None:
    part, change, kind, said = HOSTILE[name]
    with pytest.raises(kind, match=said) as caught:
        load_exported(changed(program, tmp_path / "x.pt2", part, change))
    assert str(tmp_path / "x.pt2") in str(caught.value)


def test_packed_files_are_refused(program: Path, tmp_path: Path) -> None:
    """Zeros take no place in a packed file, and all of it in memory."""
    with pytest.raises(CheckpointError, match="more than its size"):
        load_exported(changed(program, tmp_path / "x.pt2", "extra", lambda _: bytes(10**6), zipfile.ZIP_DEFLATED))


def test_example_inputs_are_not_read(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export.load unpickles them."""
    # Its warning of that cannot be formatted.
    monkeypatch.setattr(logging.getLogger("torch._export.serde.serialize"), "disabled", True)
    made = tmp_path / "made"
    buffer = io.BytesIO()
    torch.save(Evil(made), buffer)
    path = changed(program, tmp_path / "x.pt2", "data/sample_inputs/model.pt", lambda _: buffer.getvalue())
    load_exported(path)
    assert not made.exists()
    with pytest.raises(AssertionError, match="expected tuple or dict"):
        torch.export.load(path)
    assert made.exists()


@pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps(1), b"PK\x05\x06" + bytes(18)])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt2").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_exported(tmp_path / "x.pt2")
    with pytest.raises(InputError, match="no such file"):
        load_exported(tmp_path / "gone.pt2")
