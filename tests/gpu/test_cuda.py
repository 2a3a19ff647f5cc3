"""On a CUDA device: the same units as on the CPU, and a budget that is kept. Run with `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from structprune import Recipe, prune
from structprune.api import plan
from structprune.calibration.store import FileStore, MemoryStore
from structprune.engine.streaming.transfer import DeviceTransfer, transfer_for
from structprune.errors import MemoryBudgetError
from structprune.patterns import NM, sparse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def recipe(text: Path, **changes: Any) -> Recipe:
    common = {"calibration": str(text), "num_samples": 5, "seq_len": 32, "dtype": "float32", "multiple_of": 1}
    return Recipe.build(**{"device": "cuda", **common, **changes})


def kept(output: Path) -> Any:
    return json.loads((output / "pruning_manifest.json").read_text())["kept_indices"]


@pytest.mark.parametrize("method", ["fasp", "structprune", "flap", "llm-pruner", "slicegpt", "depth"])
def test_a_tiny_model_within_its_plan(method: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    changes = {} if method not in ("slicegpt", "depth") else {"multiple_of": None}
    report = prune(tiny_llama, recipe(text_file, method=method, **changes), tmp_path / "cuda")
    assert report.memory.device is not None
    assert 0 < report.memory.device.measured_peak_bytes <= report.memory.device.planned_peak_bytes
    if method not in ("slicegpt", "depth"):
        assert report.memory.device.solves == "device"
        prune(tiny_llama, recipe(text_file, method=method, device="cpu", **changes), tmp_path / "cpu")
        assert kept(tmp_path / "cuda") == kept(tmp_path / "cpu")


@pytest.mark.parametrize("in_file", [False, True])
def test_windows_move_beside_the_computation(in_file: bool, tmp_path: Path) -> None:
    """Large enough that copies take longer than it takes to ask for them, with work between them on the device."""
    shape, dtype = (40, 512, 2048), torch.float32
    store = FileStore(tmp_path / "store", shape, dtype) if in_file else MemoryStore(shape, dtype)
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(shape, generator=generator)
    store.write(0, wanted)
    transfer = transfer_for(torch.device("cuda"))
    assert isinstance(transfer, DeviceTransfer)
    weight_DD = torch.eye(2048, device="cuda")
    for _ in range(3):
        with transfer.writing(store) as put:
            for start, _, hidden_BSD in transfer.read(store, [(first, first + 4) for first in range(0, 40, 4)]):
                for _ in range(20):
                    hidden_BSD = hidden_BSD @ weight_DD
                put(start, hidden_BSD + 1)
    torch.testing.assert_close(store.read(0, 40), wanted + 3, rtol=1e-2, atol=1e-2)
    store.close()


@pytest.mark.realmodel
@pytest.mark.parametrize("method", ["fasp", "structprune"])
def test_the_real_model_within_a_budget(method: str, smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    settings = recipe(
        shared_data / "wikitext2" / "train-1mb.raw.txt", method=method, num_samples=24, seq_len=1024, dtype="bfloat16"
    )
    found = plan(smollm2, settings).plan.device
    assert found is not None
    # No more than the plan says is needed: the limit is real, so more would end the run.
    budget = found.peak_bytes
    report = prune(smollm2, settings.model_copy(update={"device_memory": budget}), tmp_path / "out")
    assert report.memory.device is not None
    assert report.memory.device.measured_peak_bytes <= budget
    assert report.memory.device.planned_peak_bytes <= 1.25 * report.memory.device.measured_peak_bytes
    with pytest.raises(MemoryBudgetError, match="device's memory budget"):
        prune(smollm2, settings.model_copy(update={"device_memory": 2**20}), tmp_path / "none")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_single_weights_within_the_plan(method: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = prune(tiny_llama, recipe(text_file, method=method, pattern="2:4", multiple_of=None), tmp_path / "cuda")
    assert report.memory.device is not None
    assert 0 < report.memory.device.measured_peak_bytes <= report.memory.device.planned_peak_bytes
    assert report.memory.device.solves == "device"
    on_cpu = prune(
        tiny_llama, recipe(text_file, method=method, pattern="2:4", multiple_of=None, device="cpu"), tmp_path / "cpu"
    )
    for found, wanted in zip(report.blocks, on_cpu.blocks, strict=True):
        assert found.kept_units == wanted.kept_units
        if wanted.error is not None:
            assert found.error == pytest.approx(wanted.error, rel=0.05)


def test_tensor_cores_multiply_what_was_pruned() -> None:
    """A pruned matrix is taken as 2:4 by the library that multiplies such ones, and its products are the dense ones."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(256, 512, generator=generator)
    pattern = NM(keep=2, of=4)
    pruned_OI = sparse(weight_OI, pattern.keep_largest(weight_OI)).to("cuda", torch.float16)
    x_IT = torch.randn(512, 128, generator=generator).to("cuda", torch.float16)
    packed_OI = torch.sparse.to_sparse_semi_structured(pruned_OI)
    torch.testing.assert_close(packed_OI.to_dense(), pruned_OI, rtol=0, atol=0)
    torch.testing.assert_close(packed_OI @ x_IT, pruned_OI @ x_IT, rtol=1e-2, atol=1e-1)
