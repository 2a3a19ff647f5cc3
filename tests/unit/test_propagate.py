"""Propagation: micro-batches equal one pass, and looking at a module's input changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from structprune.architectures.stock.model import BlockInputs, StockModel, output_tensor
from structprune.calibration.store import MemoryStore
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.streaming.propagate import Propagator, observed, tapped

NUM_WINDOWS, SEQ_LEN = 7, 12
CPU = torch.device("cpu")


class Tiny:
    """Block 0 of the tiny LLaMA with the embedded windows and the arguments for every micro-batch size."""

    def __init__(self, directory: Path) -> None:
        reader = CheckpointReader(directory)
        stock = StockModel(reader)
        embedding = reader.read(stock.embedding_tensors())
        ids_NS = torch.randint(0, 250, (NUM_WINDOWS, SEQ_LEN), generator=torch.Generator().manual_seed(0))
        layout = stock.layout.blocks[0]
        self.hidden_NSD = stock.embed(ids_NS, embedding)[0].clone()
        self.inputs: dict[int, BlockInputs] = {
            size: stock.embed(ids_NS[:size], embedding)[1] for size in range(1, NUM_WINDOWS + 1)
        }
        self.block: nn.Module = stock.block(0, reader.read(layout.shapes, layout.prefix))
        self.consumer = layout.group("mlp").consumer_module

    def store(self) -> MemoryStore:
        store = MemoryStore((NUM_WINDOWS, SEQ_LEN, self.hidden_NSD.shape[-1]), torch.float32)
        store.write(0, self.hidden_NSD)
        return store

    def whole(self) -> Tensor:
        with torch.no_grad():
            return output_tensor(self.block(self.hidden_NSD, **self.inputs[NUM_WINDOWS].kwargs[0]))


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> Tiny:
    return Tiny(tiny_llama)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 50])
def test_micro_batches_equal_one_pass(tiny: Tiny, micro_batch: int) -> None:
    """Seven windows: batches that divide them, that leave a remainder, and one that is too large."""
    store = tiny.store()
    Propagator(tiny.inputs, micro_batch, CPU).run(tiny.block, 0, store)
    torch.testing.assert_close(store.read(0, NUM_WINDOWS), tiny.whole(), rtol=1e-5, atol=1e-6)


def test_observed_sees_what_tapped_sees_and_computes_as_usual(tiny: Tiny) -> None:
    usual, seen, tapped_seen = tiny.store(), list[Tensor](), list[Tensor]()
    propagator = Propagator(tiny.inputs, 3, CPU)
    with observed(tiny.block, tiny.consumer, seen.append):
        propagator.run(tiny.block, 0, usual)
    with tapped(tiny.block, tiny.consumer, tapped_seen.append):
        propagator.run(tiny.block, 0, tiny.store())
    assert [len(x) for x in seen] == [3 * SEQ_LEN, 3 * SEQ_LEN, SEQ_LEN]
    assert torch.equal(torch.cat(seen), torch.cat(tapped_seen))
    torch.testing.assert_close(usual.read(0, NUM_WINDOWS), tiny.whole(), rtol=1e-5, atol=1e-6)
    # The consumer's own product closes the circle: residual + W x is the block's output.
    residual = tiny.store()
    with tapped(tiny.block, tiny.consumer, lambda _: None):
        propagator.run(tiny.block, 0, residual)
    added = tiny.block.get_submodule(tiny.consumer)(torch.cat(seen)).reshape(tiny.hidden_NSD.shape)
    torch.testing.assert_close(residual.read(0, NUM_WINDOWS) + added, tiny.whole(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attach", [observed, tapped])
def test_block_is_whole_again_after_an_exception(tiny: Tiny, attach: type[observed]) -> None:
    expected = tiny.whole()
    calls: list[int] = []

    def fail(x_TI: Tensor) -> None:
        calls.append(len(x_TI))
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), attach(tiny.block, tiny.consumer, fail):
        Propagator(tiny.inputs, 3, CPU).run(tiny.block, 0, tiny.store())
    assert torch.equal(tiny.whole(), expected)
    assert calls == [3 * SEQ_LEN]
