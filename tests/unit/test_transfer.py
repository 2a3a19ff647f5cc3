"""Windows that move beside the computation: a device whose copies are as late as they may be, and nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from structprune.calibration.store import FileStore, HiddenStore, MemoryStore
from structprune.engine.transfer import DeviceMover, DirectMover

CPU = torch.device("cpu")
SHAPE = (7, 3, 4)
BATCHES = [(0, 2), (2, 4), (4, 6), (6, 7)]


class LateCopy:
    """Happens when it is waited for, and not before."""

    def __init__(self, into: Tensor, source: Tensor) -> None:
        self._copy: Callable[[], object] | None = lambda: into.copy_(source)
        self._lock = threading.Lock()

    def synchronize(self) -> None:
        with self._lock:
            if self._copy is not None:
                self._copy()
                self._copy = None


class LateLane:
    """Its copies read their source at the last moment, and until then their target holds nothing of use."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []

    def page_locked(self, num_bytes: int) -> Tensor:
        self.pieces.append(torch.empty(num_bytes, dtype=torch.uint8))
        return self.pieces[-1]

    def bring(self, staged: Tensor) -> tuple[Tensor, LateCopy]:
        brought = torch.full_like(staged, torch.nan)
        return brought, LateCopy(brought, staged)

    def receive(self, brought: Tensor, arrival: LateCopy) -> None:
        arrival.synchronize()

    def send(self, computed: Tensor, staged: Tensor) -> LateCopy:
        staged.fill_(torch.nan)
        return LateCopy(staged, computed)


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


def move_all(mover: DeviceMover, store: HiddenStore, compute: Callable[[Tensor], Tensor]) -> None:
    with mover.writing(store) as put:
        for start, stop, hidden_BSD in mover.read(store, BATCHES):
            assert len(hidden_BSD) == stop - start
            put(start, compute(hidden_BSD))


def test_in_place_over_all_windows(store: HiddenStore) -> None:
    mover = DeviceMover(LateLane())
    move_all(mover, store, lambda hidden_BSD: hidden_BSD * 2 + 1)
    assert torch.equal(store.read(0, 7), torch.arange(84.0).reshape(SHAPE) * 2 + 1)


def test_the_next_windows_are_asked_for_before_these_are_used(store: HiddenStore) -> None:
    asked: list[int] = []

    def batches() -> Iterator[tuple[int, int]]:
        for batch in BATCHES:
            asked.append(batch[0])
            yield batch

    found = DeviceMover(LateLane()).read(store, batches())
    assert next(found)[0] == 0
    assert asked == [0, 2]
    assert next(found)[0] == 2
    assert asked == [0, 2, 4]


def test_two_pieces_of_page_locked_memory_each_way(store: HiddenStore) -> None:
    lane = LateLane()
    move_all(DeviceMover(lane), store, lambda hidden_BSD: hidden_BSD)
    assert len(lane.pieces) == 4
    assert {len(piece) for piece in lane.pieces} == {2 * 12 * 4}


def test_two_loops_and_another_dtype_at_once(store: HiddenStore) -> None:
    mover = DeviceMover(LateLane())
    other = MemoryStore(SHAPE, torch.bfloat16)
    with mover.writing(other) as put:
        pairs = zip(mover.read(store, BATCHES), mover.read(store, reversed(BATCHES)), strict=True)
        for (start, _, hidden_BSD), (_, _, last_BSD) in pairs:
            put(start, hidden_BSD.bfloat16())
            assert torch.equal(mover.fetch(store, start, start + 1), store.read(start, start + 1))
            assert float(last_BSD[0, 0, 0]) == dict(zip([0, 2, 4, 6], [72, 48, 24, 0], strict=True))[start]
    assert torch.equal(other.read(0, 7), torch.arange(84.0).reshape(SHAPE).bfloat16())


@pytest.mark.parametrize("fails", [0, 4, 6])
def test_a_write_that_fails_is_an_error(store: HiddenStore, fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = type(store).write

    def full(self: HiddenStore, start: int, hidden_BSD: Tensor) -> None:
        if start == fails:
            raise OSError("disk full")
        write(self, start, hidden_BSD)

    monkeypatch.setattr(type(store), "write", full)
    mover = DeviceMover(LateLane())
    with pytest.raises(OSError, match="disk full"):
        move_all(mover, store, lambda hidden_BSD: hidden_BSD)


def test_an_error_between_leaves_nothing_running(store: HiddenStore) -> None:
    mover = DeviceMover(LateLane())

    def stop(hidden_BSD: Tensor) -> Tensor:
        if hidden_BSD[0, 0, 0] > 20:
            raise ValueError("stop")
        return hidden_BSD

    with pytest.raises(ValueError, match="stop"):
        move_all(mover, store, stop)
    store.close()
    other = MemoryStore(SHAPE, torch.float32)
    other.write(0, torch.ones(SHAPE))
    assert torch.equal(mover.fetch(other, 3, 5), torch.ones(2, 3, 4))


def test_the_host_has_nothing_to_move() -> None:
    store = MemoryStore(SHAPE, torch.float32)
    store.write(0, torch.ones(SHAPE))
    mover = DirectMover(CPU)
    with mover.writing(store) as put:
        for start, _, hidden_BSD in mover.read(store, BATCHES):
            assert hidden_BSD.data_ptr() == store.read(start, start + 1).data_ptr()
            put(start, hidden_BSD + 1)
    assert torch.equal(store.read(0, 7), torch.full(SHAPE, 2.0))
