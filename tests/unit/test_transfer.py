"""Windows that move beside the computation: a device whose copies are as late as they may be, and nothing is lost."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from structprune.calibration.store import FileStore, HiddenStore, MemoryStore
from structprune.engine.streaming.transfer import CudaCopyStream, DeviceTransfer, DirectTransfer, WindowTransfer
from support.deferred_copies import DeferredCopyStream

CPU = torch.device("cpu")
SHAPE = (7, 3, 4)
BATCHES = [(0, 2), (2, 4), (4, 6), (6, 7)]


class SlowStore(MemoryStore):
    """Says whether someone is at it."""

    def __init__(self) -> None:
        super().__init__(SHAPE, torch.float32)
        super().write(0, torch.arange(84.0).reshape(SHAPE))
        self.busy = 0

    def read(self, start: int, stop: int) -> Tensor:
        return self._slowly(lambda: super(SlowStore, self).read(start, stop))

    def write(self, start: int, hidden_BSD: Tensor) -> None:
        self._slowly(lambda: super(SlowStore, self).write(start, hidden_BSD))

    def _slowly(self, work: Callable[[], Any]) -> Any:
        self.busy += 1
        time.sleep(0.02)
        result = work()
        self.busy -= 1
        return result


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HiddenStore]:
    made = (
        MemoryStore(SHAPE, torch.float32)
        if request.param == "memory"
        else FileStore(tmp_path / "s", SHAPE, torch.float32)
    )
    made.write(0, torch.arange(84.0).reshape(SHAPE))
    yield made
    made.close()


def move_all(
    stream: DeferredCopyStream,
    store: HiddenStore,
    compute: Callable[[Tensor], Tensor] = lambda x: x,
    transfer: WindowTransfer | None = None,
) -> None:
    transfer = transfer or DeviceTransfer(stream)
    with transfer.writing(store) as put:
        for start, stop, hidden_BSD in transfer.read(store, BATCHES):
            assert len(hidden_BSD) == stop - start
            put(start, stream.compute(compute, hidden_BSD))


def test_in_place_over_all_windows(store: HiddenStore) -> None:
    move_all(DeferredCopyStream(), store, lambda hidden_BSD: hidden_BSD * 2 + 1)
    assert torch.equal(store.read(0, 7), torch.arange(84.0).reshape(SHAPE) * 2 + 1)


def test_a_host_that_runs_ahead_of_the_device(store: HiddenStore) -> None:
    """Nothing is computed before all batches were asked for."""
    stream = DeferredCopyStream()
    transfer = DeviceTransfer(stream)
    found = [stream.compute(torch.neg, hidden_BSD) for *_, hidden_BSD in transfer.read(store, BATCHES)]
    stream.finish()
    assert torch.equal(torch.cat(found), -torch.arange(84.0).reshape(SHAPE))


def test_results_faster_than_the_store() -> None:
    stream, store = DeferredCopyStream(), SlowStore()
    values = torch.randn(SHAPE)
    with DeviceTransfer(stream).writing(store) as put:
        for start, stop in BATCHES:
            put(start, stream.compute(torch.neg, values[start:stop]))
            # The store is at the first of them by now.
            time.sleep(0.005)
    assert torch.equal(store.read(0, 7), -values)


def test_the_next_windows_are_asked_for_before_these_are_used(store: HiddenStore) -> None:
    asked: list[int] = []

    def batches() -> Iterator[tuple[int, int]]:
        for batch in BATCHES:
            asked.append(batch[0])
            yield batch

    found = DeviceTransfer(DeferredCopyStream()).read(store, batches())
    assert next(found)[0] == 0
    assert asked == [0, 2]
    assert next(found)[0] == 2
    assert asked == [0, 2, 4]


def test_two_pieces_of_page_locked_memory_each_way(store: HiddenStore) -> None:
    stream = DeferredCopyStream()
    move_all(stream, store)
    assert len(stream.pieces) == 4
    assert {len(piece) for piece in stream.pieces} == {2 * 12 * 4}


def test_two_loops_at_once(store: HiddenStore) -> None:
    stream = DeferredCopyStream()
    transfer = DeviceTransfer(stream)
    pairs = zip(transfer.read(store, BATCHES), transfer.read(store, reversed(BATCHES)), strict=True)
    for (start, stop, hidden_BSD), (first, last, other_BSD) in pairs:
        again_BSD = transfer.fetch(store, start, stop)
        stream.finish()
        assert torch.equal(hidden_BSD, store.read(start, stop))
        assert torch.equal(again_BSD, store.read(start, stop))
        assert torch.equal(other_BSD, store.read(first, last))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_numbers_of_another_width(dtype: torch.dtype) -> None:
    stream, store = DeferredCopyStream(), MemoryStore(SHAPE, dtype)
    store.write(0, torch.arange(84.0).reshape(SHAPE).to(dtype))
    move_all(stream, store, torch.neg)
    assert torch.equal(store.read(0, 7), -torch.arange(84.0).reshape(SHAPE).to(dtype))


@pytest.mark.parametrize("fails", [0, 4, 6])
def test_a_write_that_fails_is_an_error(store: HiddenStore, fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = type(store).write

    def full(self: HiddenStore, start: int, hidden_BSD: Tensor) -> None:
        if start == fails:
            raise OSError("disk full")
        write(self, start, hidden_BSD)

    monkeypatch.setattr(type(store), "write", full)
    with pytest.raises(OSError, match="disk full"):
        move_all(DeferredCopyStream(), store)


@pytest.mark.parametrize("batch", range(4))
def test_an_error_between_leaves_nothing_running(batch: int) -> None:
    stream, store = DeferredCopyStream(), SlowStore()
    transfer = DeviceTransfer(stream)

    def stop(start: int) -> None:
        if start == BATCHES[batch][0]:
            raise ValueError("stop")

    def move() -> None:
        with transfer.writing(store) as put:
            for start, _, hidden_BSD in transfer.read(store, BATCHES):
                put(start, stream.compute(torch.neg, hidden_BSD))
                stop(start)

    with pytest.raises(ValueError, match="stop") as caught:
        move()
    # The generator ends with the last frame that knows it.
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    assert store.busy == 0
    time.sleep(0.03)
    assert store.busy == 0
    assert torch.equal(store.read(0, 2), -torch.arange(24.0).reshape(2, 3, 4))


def test_a_loop_that_is_left_reads_no_more() -> None:
    store = SlowStore()
    found = DeviceTransfer(DeferredCopyStream()).read(store, BATCHES)
    next(found)
    time.sleep(0.005)
    found.close()
    assert store.busy == 0


def test_the_host_has_nothing_to_move() -> None:
    store = MemoryStore(SHAPE, torch.float32)
    store.write(0, torch.ones(SHAPE))
    transfer = DirectTransfer(CPU)
    with transfer.writing(store) as put:
        for start, _, hidden_BSD in transfer.read(store, BATCHES):
            assert hidden_BSD.data_ptr() == store.read(start, start + 1).data_ptr()
            put(start, hidden_BSD + 1)
    assert torch.equal(store.read(0, 7), torch.full(SHAPE, 2.0))


class FakeStreams:
    """`torch.cuda` as far as the stream uses it: what happened, and on which stream."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, ...]] = []
        self.now = self.stream("computing")
        self.made = iter(["there", "back"])
        patch.setattr(torch.cuda, "Stream", lambda _: self.stream(next(self.made)))
        patch.setattr(torch.cuda, "current_stream", lambda _: self.now)
        patch.setattr(torch.cuda, "stream", self.on)

    def stream(self, name: str) -> Any:
        def wait_event(event: str) -> None:
            self.log.append(("wait", name, event))

        def record_event() -> str:
            self.log.append(("record", name))
            return f"event of {name}"

        return SimpleNamespace(name=name, wait_event=wait_event, record_event=record_event)

    @contextmanager
    def on(self, stream: Any) -> Generator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


def test_the_order_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy on its own stream, behind what it needs; memory that two streams use is held for both."""
    streams = FakeStreams(monkeypatch)
    log = streams.log

    class WithHeartbeat(Tensor):
        def to(self, *_: Any, **options: bool) -> Any:
            log.append(("copy", streams.now.name, str(options["non_blocking"])))
            return self

        def copy_(self, *_: Any, **options: bool) -> Any:
            log.append(("copy", streams.now.name, str(options["non_blocking"])))
            return self

        def record_stream(self, stream: Any) -> None:
            log.append(("hold", stream.name))

    stream = CudaCopyStream(CPU)
    x = torch.zeros(2).as_subclass(WithHeartbeat)
    brought, event = stream.bring(x)
    assert log == [("copy", "there", "True"), ("record", "there")]
    log.clear()
    stream.receive(brought, event)
    assert log == [("wait", "computing", "event of there"), ("hold", "computing")]
    log.clear()
    assert str(stream.send(x, x)) == "event of back"
    assert log == [
        ("record", "computing"),
        ("wait", "back", "event of computing"),
        ("copy", "back", "True"),
        ("record", "back"),
        ("hold", "back"),
    ]
