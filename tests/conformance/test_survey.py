"""The streamed backward pass gives whole-model autograd's gradients, and the sensitivities that follow from them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import TINY_MODELS, save_tiny
from structprune.architectures.sampler import draw_tokens
from structprune.architectures.stock import StockModel
from structprune.calibration.context import CalibrationWindows
from structprune.calibration.store import MemoryStore
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.embed import embed
from structprune.engine.job import Job
from structprune.engine.observer import SilentObserver
from structprune.engine.planner import PrunePlan
from structprune.engine.survey import backward, load_sensitivity, survey
from structprune.engine.walk import loss_gradient
from structprune.methods import METHODS
from structprune.recipe import Recipe

NUM_WINDOWS, SEQ_LEN = 3, 24


def job_for(directory: Path) -> Job:
    reader = CheckpointReader(directory)
    stock = StockModel(reader)
    ids_NS = torch.randint(0, 250, (NUM_WINDOWS, SEQ_LEN), generator=torch.Generator().manual_seed(5))
    plan = PrunePlan(
        budget_bytes=2**30, phases={"all": 0}, store="memory", store_bytes=0, micro_batch_windows=2, disk_bytes=0
    )
    return Job(
        source="tiny",
        reader=reader,
        stock=stock,
        recipe=Recipe(method="structprune", sensitivity_samples=NUM_WINDOWS, damping=1e-2, multiple_of=1),
        method=METHODS.get("structprune"),
        kinds=tuple(g.kind for g in stock.groups),
        plan=plan,
        calibration_name="test",
        windows=CalibrationWindows(ids_NS=ids_NS, description="test"),
        num_probe=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        started=time.perf_counter(),
    )


@pytest.fixture(params=list(TINY_MODELS))
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny(request.param, tmp_path / "model")


def test_streamed_gradients_equal_whole_model_autograd(tiny: Path, tmp_path: Path) -> None:
    job = job_for(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="sdpa").eval()
    outputs: dict[tuple[int, str], torch.Tensor] = {}

    def keep(key: tuple[int, str]) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[key] = output

        return hook

    blocks = model.get_submodule(job.stock.family.blocks_module)
    for index, block in enumerate(blocks):
        for group in job.stock.groups:
            block.get_submodule(group.consumer_module).register_forward_hook(keep((index, group.kind)))
    generator = torch.Generator().manual_seed(job.recipe.seed)
    expected = {(b.index, g.kind): torch.zeros(32, 32) for b in job.stock.layout.blocks for g in job.stock.groups}
    for window in range(NUM_WINDOWS):
        logits_SV = model(input_ids=job.windows.ids_NS[window : window + 1]).logits[0, :-1]
        labels_S = torch.cat([draw_tokens(part.detach(), generator)[:, 0] for part in logits_SV.split(32)])
        model.zero_grad()
        nn.functional.cross_entropy(logits_SV, labels_S, reduction="sum").backward()
        for key, output in outputs.items():
            assert output.grad is not None
            grad_TO = output.grad.reshape(-1, 32)
            expected[key] += grad_TO.T @ grad_TO / (NUM_WINDOWS * SEQ_LEN)
    survey(job, tmp_path / "survey", SilentObserver())
    for block in job.stock.layout.blocks:
        found = load_sensitivity(tmp_path / "survey", block.index)
        for group in job.stock.groups:
            difference = (found[group.kind] - expected[block.index, group.kind]).norm()
            assert float(difference / expected[block.index, group.kind].norm()) < 1e-5


def test_gradient_by_the_embedding_output(tiny: Path) -> None:
    """The last thing that the backward walk reaches: the derivative by the first block's input."""
    job = job_for(tiny)
    store = MemoryStore((NUM_WINDOWS, SEQ_LEN, 32), torch.float32)
    propagator = embed(job, {store: NUM_WINDOWS})
    borders: list[MemoryStore] = []
    for block in job.stock.layout.blocks:
        borders.append(MemoryStore((NUM_WINDOWS, SEQ_LEN, 32), torch.float32))
        borders[-1].write(0, store.read(0, NUM_WINDOWS))
        module = job.stock.block(block.index, job.reader.read(block.shapes, block.prefix))
        propagator.run(module, block.index, store, write=True)
    gradient = MemoryStore((NUM_WINDOWS, SEQ_LEN, 32), torch.float32)
    loss_gradient(job, store, gradient, "sampled")
    for block in reversed(job.stock.layout.blocks):
        backward(job, block, propagator, borders[block.index], gradient)

    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="sdpa").eval()
    embedded: list[torch.Tensor] = []

    def keep(_: nn.Module, __: object, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.get_input_embeddings().register_forward_hook(keep)
    generator = torch.Generator().manual_seed(job.recipe.seed)
    for window in range(NUM_WINDOWS):
        logits_SV = model(input_ids=job.windows.ids_NS[window : window + 1]).logits[0, :-1]
        labels_S = draw_tokens(logits_SV.detach(), generator)[:, 0]
        nn.functional.cross_entropy(logits_SV, labels_S, reduction="sum").backward()
        expected = embedded[-1].grad
        assert expected is not None
        assert float((gradient.read(window, window + 1) - expected).norm() / expected.norm()) < 1e-5
