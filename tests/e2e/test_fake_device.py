"""Whole runs on a device with memory of its own that the CPU plays: nothing is mixed, and the bytes are the host's."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from structprune import Recipe, prune
from structprune.api import recover
from structprune.assess import evaluate, quality
from structprune.engine import resolve
from structprune.engine.pipelines import units_settings
from structprune.engine.planning import host as host_plan
from structprune.engine.planning.device import LIBRARY_BYTES
from structprune.engine.planning.host import PLACES
from structprune.engine.streaming import propagate
from structprune.engine.streaming.transfer import DeviceTransfer, WindowTransfer
from structprune.recipe.training import RecoverySettings
from structprune.training import run
from support import fake_device, pipeline_cases
from support.deferred_copies import DeferredCopyStream, Event
from support.fake_gpu import GIB, FakeGpu
from support.models import TINY_MODELS, llama_config, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS: dict[str, tuple[str, dict[str, Any]]] = pipeline_cases.RUNS | {
    "fasp-all": ("llama", {"method": "fasp", "scope": "all"}),
    "search": ("llama", {"method": "structprune", "score": "greedy-swap"}),
    "normed-all": ("gemma2", {"method": "structprune", "scope": "all"}),
    "transposed": ("gpt2", {"method": "structprune"}),
    "spap": ("llama", {"method": "spap"}),
    "osscar": ("llama", {"method": "osscar"}),
    "flap-all": ("llama", {"method": "flap", "scope": "all"}),
    "wanda-sp": ("llama", {"method": "wanda-sp"}),
    "magnitude": ("llama", {"method": "magnitude"}),
    "random": ("llama", {"method": "random"}),
    "widths": (
        "llama",
        {"method": "structprune", "search": "evopress", "search_generations": 1, "search_children": 2},
    ),
}


def recipe(name: str, text_file: Path) -> Recipe:
    return pipeline_cases.tiny_recipe(RUNS[name][1], text_file, reload_check=False)


class FakeCopyStream(DeferredCopyStream):
    """The fake device computes when it is asked to, so what it computes with has to be there."""

    def receive(self, brought: Tensor, event: Event) -> None:
        event.synchronize()


class Board(FakeGpu):
    """Its memory as this package measures that of a GPU."""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        super().install(patch)
        patch.setattr(torch.cuda, "memory_allocated", lambda _: fake_device.allocated_bytes())
        patch.setattr(torch.cuda, "max_memory_allocated", lambda _: fake_device.peak_bytes())
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: fake_device.reset_peak())
        for module in (resolve, quality, run):
            patch.setattr(module, "resolve_device", lambda _: torch.device(fake_device.NAME, 0))
        patch.setattr(resolve, "device_budget", lambda _, asked: GIB if asked is None else asked)
        patch.setattr(propagate, "transfer_for", self.transfer_for)

    def transfer_for(self, device: torch.device) -> WindowTransfer:
        assert device.type == fake_device.NAME
        return DeviceTransfer(FakeCopyStream(fake_device.NAME))


def on_the_host(source: Path, settings: Recipe, output: Path) -> Any:
    """Without activations that are kept, which a device has no room for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units_settings, "cacheable", lambda *_: ())
        return prune(source, settings, output)


def on_the_fake_device(source: Path, settings: Recipe, output: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        Board().install(patch)
        return prune(source, settings, output)


def kept(output: Path) -> Any:
    return json.loads((output / "pruning_manifest.json").read_text())["kept_indices"]


# What differs from another run here in its score, selector or scope alone: of these, `test_device_solves.py` has all.
ALIKE = ("normed", "search", "fasp-all", "spap", "osscar", "flap-all", "wanda-sp", "magnitude", "random")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in RUNS])
def test_the_bytes_are_the_hosts(name: str, text_file: Path, tmp_path: Path) -> None:
    source = save_tiny(RUNS[name][0], tmp_path / "model", num_blocks=3)
    settings = recipe(name, text_file)
    host = on_the_host(source, settings, tmp_path / "host")
    report = on_the_fake_device(source, settings, tmp_path / "fake")
    assert host.memory.device is None
    assert report.memory.device is not None
    assert report.memory.device.solves == "device"
    assert kept(tmp_path / "fake") == kept(tmp_path / "host")
    for path in (tmp_path / "host").glob("*.safetensors"):
        assert (tmp_path / "fake" / path.name).read_bytes() == path.read_bytes(), path.name
    for name in ("dense_perplexity", "pruned_perplexity"):
        assert getattr(report.calibration, name) == pytest.approx(getattr(host.calibration, name), rel=1e-6)
    gc.collect()
    assert fake_device.allocated_bytes() == 0


@pytest.mark.parametrize("mode", ["stream", "blocks", "lora"])
def test_recovery(mode: str, tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    if mode == "lora":
        pytest.importorskip("peft")
    common: dict[str, Any] = {"num_samples": 20, "seq_len": 32, "dtype": "float32", "reload_check": False}
    settings = RecoverySettings.build(mode=mode, calibration=(str(text_file),), held_out=4, warmup=2, **common)
    student = tmp_path / "student"
    prune(tiny_llama, recipe("wanda-sp", text_file), student)
    host = recover(student, tiny_llama, settings, tmp_path / "host")
    with pytest.MonkeyPatch.context() as patch:
        Board().install(patch)
        report = recover(student, tiny_llama, settings, tmp_path / "fake")
    assert report.after.divergence < report.before.divergence
    assert report.before.divergence == pytest.approx(host.before.divergence, rel=1e-5)
    assert report.after.divergence == pytest.approx(host.after.divergence, rel=1e-3)


@pytest.mark.parametrize("stream", [False, True])
def test_evaluation(stream: bool, tiny_llama: Path, text_file: Path) -> None:
    def found() -> Any:
        return evaluate(tiny_llama, text_file, seq_len=32, max_windows=6, stream=stream, dtype="float32")

    host = found()
    with pytest.MonkeyPatch.context() as patch:
        Board().install(patch)
        assert found().perplexity == pytest.approx(host.perplexity, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        *(("structprune", places) for places in PLACES),
        ("fasp", PLACES[2]),
        ("experts", PLACES[1]),
        ("spap", PLACES[1]),
        *(pytest.param("fasp", places, marks=pytest.mark.slow) for places in PLACES[:2]),
        *(pytest.param(name, places, marks=pytest.mark.slow) for name in ("experts", "spap") for places in PLACES[::2]),
    ],
)
def test_wherever_the_plan_has_sums_and_solves(
    name: str, places: tuple[str, str], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(RUNS[name][0], tmp_path / "model", num_blocks=2)
    settings = recipe(name, text_file)
    on_the_host(source, settings, tmp_path / "host")
    monkeypatch.setattr(host_plan, "PLACES", (places,))
    report = on_the_fake_device(source, settings, tmp_path / "fake")
    assert report.memory.device is not None
    assert (report.memory.device.sums, report.memory.device.solves) == places
    assert kept(tmp_path / "fake") == kept(tmp_path / "host")


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gram of 4 MiB and blocks of 10: far more than what is rounded."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
        patch.setitem(TINY_MODELS, "wide", lambda: LlamaForCausalLM(llama_config(**sizes)))
        return save_tiny("wide", tmp_path_factory.mktemp("wide") / "llama")


ALL_THERE = PLACES[0]
STRUCTPRUNE = {"method": "structprune", "sensitivity_samples": 4}
# Settings, places, and how many times what is measured may be planned.
BOUNDS: list[Any] = [
    # The same method with a sensitivity pass of three micro-batches, and with a short one.
    ({}, ALL_THERE, 1.25),
    *(pytest.param({}, places, 1.25, marks=pytest.mark.slow) for places in PLACES[1:]),
    pytest.param(STRUCTPRUNE, ALL_THERE, 1.25, marks=pytest.mark.slow),
    *((STRUCTPRUNE, places, 1.25) for places in PLACES[1:]),
    pytest.param({"scope": "all"}, ALL_THERE, 1.25, marks=pytest.mark.slow),
    pytest.param({"damping": 1e-4}, ALL_THERE, 1.25, marks=pytest.mark.slow),
    # Libraries of a GPU may copy what is not laid out as they want it.
    pytest.param({"score": "greedy-swap"}, ALL_THERE, 1.5, marks=pytest.mark.slow),
    ({"method": "magnitude", "repair": "scales", "num_samples": 3}, ALL_THERE, 1.25),
    # Rotated on the host; the plan has it on the device too.
    ({"method": "slicegpt", "sparsity": 0.1}, ALL_THERE, 1.75),
]


@pytest.mark.parametrize(("changes", "places", "most"), BOUNDS)
def test_no_more_memory_than_planned(
    changes: dict[str, Any],
    places: tuple[str, str],
    most: float,
    wide_llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three micro-batches. The fake device has no libraries, which the plan allows for."""
    common = {"calibration": str(text_file), "num_samples": 96, "seq_len": 64, "dtype": "float32"}
    settings = Recipe.build(**{**common, "reload_check": False} | changes)
    monkeypatch.setattr(host_plan, "PLACES", (places,))
    memory = on_the_fake_device(wide_llama, settings, tmp_path / "fake").memory.device
    assert memory is not None
    planned = memory.planned_peak_bytes - LIBRARY_BYTES
    assert memory.measured_peak_bytes <= planned <= most * memory.measured_peak_bytes
