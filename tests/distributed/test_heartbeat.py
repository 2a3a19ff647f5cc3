"""The heartbeat over other ranks, on a store in this process: who is named, and why. It waits for seconds each time."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence

import pytest

from structprune.engine.ranks.heartbeat import BEAT_S, Heartbeat, prepare
from structprune.errors import RankError

LIMIT_S = 6 * BEAT_S


class DictStore:
    """What the launcher's store does, for the threads of one process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.lock = threading.Lock()
        self.answers = True

    def _wait(self) -> None:
        while not self.answers:
            time.sleep(0.01)

    def set(self, key: str, value: str, /) -> None:
        self._wait()
        with self.lock:
            self.values[key] = value

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str], /) -> Sequence[bytes]:
        self._wait()
        return [self.values[key].encode() for key in keys]

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        with self.lock:
            if self.values.get(key, "") == expected:
                self.values[key] = desired
            return self.values[key].encode()


class Ranks:
    """Three watches on one store."""

    def __init__(self) -> None:
        self.store = DictStore()
        prepare(self.store)
        self.watches = [Heartbeat(self.store, "host:1 (rank 0)", rank, 3, LIMIT_S) for rank in range(3)]
        for heartbeat in self.watches:
            heartbeat.first_sign()
        for heartbeat in self.watches:
            heartbeat.start()

    def said(self, rank: int) -> str:
        """What ends the run there; waits for it."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                self.watches[rank].check()
            except RankError as error:
                return str(error)
            time.sleep(0.05)
        raise AssertionError(f"rank {rank} was told of nothing")


@pytest.fixture
def ranks() -> Generator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.store.answers = True
    for heartbeat in ranks.watches:
        heartbeat.stop()


@pytest.mark.distributed
def test_nothing_is_said_of_a_run_without_faults(ranks: Ranks) -> None:
    time.sleep(LIMIT_S + 2 * BEAT_S)
    for heartbeat in ranks.watches:
        heartbeat.check()


def test_silence_is_told_to_all(ranks: Ranks) -> None:
    ranks.watches[1].stop()
    for rank in (0, 2):
        assert f"rank 1 has given no sign of life for {LIMIT_S:g} s" in ranks.said(rank)


def test_a_failure_is_told_to_all(ranks: Ranks) -> None:
    ranks.watches[2].report("ended with ValueError: of its own")
    for rank in range(3):
        assert "rank 2 ended with ValueError: of its own. `structprune resume` goes on" in ranks.said(rank)


@pytest.mark.distributed
def test_who_does_not_come_is_named(ranks: Ranks) -> None:
    for rank in (0, 2):
        ranks.watches[rank].enter()
    for rank in (0, 1, 2):
        assert f"rank 1 is alive but has not come to step 1 for {LIMIT_S:g} s" in ranks.said(rank)


@pytest.mark.distributed
def test_who_is_silent_is_not_called_alive(ranks: Ranks) -> None:
    """It stops while the others wait for it, so both limits are over at nearly the same time."""
    for rank in (0, 2):
        ranks.watches[rank].enter()
    ranks.watches[1].stop()
    assert f"rank 1 has given no sign of life for {LIMIT_S:g} s" in ranks.said(0)


@pytest.mark.distributed
def test_a_task_may_take_longer(ranks: Ranks) -> None:
    ranks.watches[1].busy = True
    for rank in (0, 2):
        ranks.watches[rank].enter()
    time.sleep(LIMIT_S + 4 * BEAT_S)
    ranks.watches[0].check()
    ranks.watches[1].enter()
    for heartbeat in ranks.watches:
        heartbeat.leave()


@pytest.mark.distributed
def test_a_link_between_ranks(ranks: Ranks) -> None:
    """All have come, and nothing ends."""
    for heartbeat in ranks.watches:
        heartbeat.enter()
    assert f"step 1 has not ended for {LIMIT_S:g} s: is a link between ranks cut?" in ranks.said(0)


@pytest.mark.distributed
def test_a_store_that_does_not_answer(ranks: Ranks) -> None:
    ranks.store.answers = False
    assert f"the store at host:1 (rank 0) has not answered for {LIMIT_S:g} s: is the network cut?" in ranks.said(2)


def test_interrupted_because_another_died(ranks: Ranks) -> None:
    ranks.watches[1].stop()
    fault = ranks.watches[0].interrupted()
    assert fault is not None
    assert fault.culprit == 1


def test_all_interrupted(ranks: Ranks) -> None:
    """Nobody died: nobody is named, and nobody waits for long."""
    found: list[object] = []
    threads = [threading.Thread(target=lambda w=w: found.append(w.interrupted())) for w in ranks.watches]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [None] * 3
    assert time.monotonic() - started < 20
