"""`--device-memory`, with blocks that run on the CPU as if it were a device with memory of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from structprune import Recipe, prune
from structprune.api import plan, resume
from structprune.engine import resolve
from structprune.errors import MemoryBudgetError
from structprune.observer import SilentObserver
from structprune.results.summary import summary_rows
from support.command_line import CommandLine
from support.fake_gpu import GIB, FakeGpu
from support.models import TINY_MODELS, llama_config, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


class FreeMemory:
    """What the device has free at this moment; a budget that is asked for counts instead."""

    def __init__(self, free: int) -> None:
        self.free = free

    def budget(self, _: torch.device, asked: int | None) -> int:
        return self.free if asked is None else asked


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FreeMemory:
    FakeGpu().install(monkeypatch)
    free = FreeMemory(GIB)
    monkeypatch.setattr(resolve, "device_budget", free.budget)
    return free


def recipe(text_file: Path, **changes: Any) -> Recipe:
    common = {"calibration": str(text_file), "num_samples": 5, "seq_len": 32, "dtype": "float32", "multiple_of": 1}
    return Recipe.build(**{"method": "structprune", **common, **changes})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums of 1,500 channels, which are most of what a device would hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_MODELS, "wide", lambda: LlamaForCausalLM(llama_config(intermediate_size=1500)))
        return save_tiny("wide", tmp_path_factory.mktemp("wide") / "llama")


def budget_for_sums_on_the_host(model: Path, settings: Recipe) -> int:
    """The largest with which the sums do not fit on the device."""
    budget = GIB
    while True:
        found = plan(model, settings.model_copy(update={"device_memory": budget})).plan.device
        assert found is not None
        if found.sums == "host":
            return budget
        budget = found.peak_bytes - 1


@pytest.mark.parametrize("scope", ["mlp", "all"])
def test_sums_on_the_host_remove_the_same_units(
    gpu: FreeMemory, wide: Path, text_file: Path, tmp_path: Path, scope: str
) -> None:
    # More tokens than channels: with fewer, rounding decides between units that the others can make up for.
    settings = recipe(text_file, scope=scope, num_samples=64)
    roomy = prune(wide, settings, tmp_path / "roomy")
    budget = budget_for_sums_on_the_host(wide, settings)
    tight = prune(wide, settings.model_copy(update={"device_memory": budget}), tmp_path / "tight")
    assert roomy.memory.device is not None
    assert tight.memory.device is not None
    assert (roomy.memory.device.sums, tight.memory.device.sums) == ("device", "host")
    assert (roomy.memory.device.budget_bytes, tight.memory.device.budget_bytes) == (GIB, budget)
    assert roomy.recipe.device_memory == GIB
    for name in ("roomy", "tight"):
        manifest = json.loads((tmp_path / name / "pruning_manifest.json").read_text())
        assert manifest["recipe"]["device_memory"] in (GIB, budget)
    one, other = (
        json.loads((tmp_path / name / "pruning_manifest.json").read_text())["kept_indices"]
        for name in ("roomy", "tight")
    )
    for block, kinds in one.items():
        for kind, units in kinds.items():
            # Sums in another order: on some processors rounding decides between units that are as good.
            assert len(set(units) ^ set(other[block][kind])) <= 0.03 * len(units), (block, kind)
    same = {block for block in one if one[block] == other[block]}
    assert same
    shards = sorted(path.name for path in (tmp_path / "roomy").glob("*.safetensors"))
    for shard in shards:
        found, wanted = (load_file(tmp_path / name / shard) for name in ("tight", "roomy"))
        for name, tensor in wanted.items():
            if all(f"layers.{block}." not in name for block in one.keys() - same):
                torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)
    assert "peak device memory" in dict(summary_rows(tight))


def test_without_a_device_the_report_says_nothing_of_one(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    report = prune(tiny_llama, recipe(text_file, method="fasp"), tmp_path / "out")
    assert report.memory.device is None
    assert report.recipe.model_dump(mode="json")["device_memory"] is None
    assert "peak device memory" not in dict(summary_rows(report))


class CutAfterOneBlock(SilentObserver):
    """Ends the process as Ctrl-C would."""

    def advance(self, line: str) -> None:
        if line.startswith("block 0 mlp"):
            raise KeyboardInterrupt


def test_a_run_goes_on_with_the_budget_that_it_began_with(
    gpu: FreeMemory, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Whatever is free on the device by then: another plan would add up in another order."""
    settings = recipe(text_file)
    whole = prune(tiny_llama, settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_llama, settings, tmp_path / "cut", CutAfterOneBlock())
    gpu.free = 2 * GIB
    report = resume(tmp_path / "cut")
    assert report.memory.device == whole.memory.device
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_what_does_not_fit_is_refused_before_work(
    gpu: FreeMemory, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(MemoryBudgetError, match="does not fit in the device's memory budget"):
        prune(tiny_llama, recipe(text_file, device_memory="1MiB"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_sampled_text_has_the_smaller_of_both_budgets(
    gpu: FreeMemory, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """The whole model is in both, one after the other."""
    seen: list[int] = []
    inner = resolve.source_context

    def noted(*arguments: Any, budget_bytes: int, **options: Any) -> Any:
        seen.append(budget_bytes)
        return inner(*arguments, budget_bytes=budget_bytes, **options)

    monkeypatch.setattr(resolve, "source_context", noted)
    for number, (host, device) in enumerate([("2GiB", "512MiB"), ("512MiB", "2GiB")]):
        prune(tiny_llama, recipe(text_file, method="fasp", memory=host, device_memory=device), tmp_path / str(number))
    assert seen == [GIB // 2, GIB // 2]


def test_the_plan_shows_the_device(gpu: FreeMemory, tiny_llama: Path, command_line: CommandLine) -> None:
    flags = ("--num-samples", 4, "--seq-len", 32, "--dtype", "float32", "--device-memory", "512MiB")
    code, out, err = command_line("plan", tiny_llama, *flags, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["device_memory"]
    assert found["budget_bytes"] == GIB // 2
    assert found["planned_peak_bytes"] == max(found["phases"].values())
    assert found["sums"] == "device"
    code, out, _ = command_line("plan", tiny_llama, *flags)
    assert code == 0
    for text in ("peak device memory", "512.0 MiB that the run may add", "sums of activations", "on the device"):
        assert text in out


def test_a_cpu_has_no_device_memory(tiny_llama: Path, tmp_path: Path, command_line: CommandLine) -> None:
    flags = ("--device", "cpu", "--device-memory", "2GiB")
    code, _, err = command_line("prune", tiny_llama, "-o", tmp_path / "out", *flags)
    assert code == 2
    assert "--device-memory is the budget of a CUDA device; got 2.0 GiB with --device cpu, wanted --device cuda" in err
    assert list(tmp_path.iterdir()) == []
