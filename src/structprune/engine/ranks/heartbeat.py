"""Guards the ranks of a shared run: one that dies, hangs or fails ends the run everywhere, and is named.

Every rank gives signs of life through a store that all of them reach, twice a second, from a thread; another thread
judges what came, so that a store that does not answer is noticed as well. The main thread asks (`check`) whenever it
waits for others. A main thread that cannot ask, because it computes or hangs itself, is ended with the process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from structprune.errors import RankError

BEAT_S = 0.5
# A process that is known to have lost somebody takes one for dead after this silence; others wait for the whole limit.
_DEAD_S = 6 * BEAT_S
# Who was heard so lately is alive.
_FRESH_S = 4 * BEAT_S
# Swapping and busy machines stop threads for seconds.
_LONGEST_SILENCE_S = 60.0
# A rank may have a task that all others wait for: a solve, or the end of the run. It may take so many times as long.
_TASK_PATIENCE = 10


class Store(Protocol):
    """The part of `torch.distributed.Store` that is used; several threads may not share one."""

    def set(self, key: str, value: str, /) -> object: ...

    def check(self, keys: list[str], /) -> bool: ...

    def multi_get(self, keys: list[str], /) -> Sequence[bytes]: ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why the run ends."""

    culprit: int | None
    """The rank; None: not known."""
    text: str

    def error(self) -> RankError:
        """Return the fault as an exception, whose text says which rank it is."""
        return RankError(
            self.text,
            where="shared run",
            do="`structprune resume` goes on where it was, also with another number of ranks",
        )


class Heartbeat:
    """Watch of one rank over the others. `store` is this object's own; `timeout_s` as in `--rank-timeout`."""

    def __init__(self, store: Store, place: str, rank: int, size: int, timeout_s: float) -> None:
        self._store, self._place = store, place
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.silence_s = min(timeout_s, _LONGEST_SILENCE_S)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._fault: Fault | None = None
        self._noticed = False
        self._own: Fault | None = None
        self._interrupted = False
        self.busy = False
        """Whether the main thread is at a task of this rank's own."""
        self._step = 0
        self._waits_since: float | None = None
        self._beats: list[tuple[str, float]] = []
        self._answered = 0.0
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._judge)]

    def start(self) -> None:
        """Begin. By now every rank must have called `first_sign`."""
        now = time.monotonic()
        self._beats = [("", now)] * self.size
        self._answered = now
        for thread in self._threads:
            thread.start()

    def first_sign(self) -> None:
        """Give this rank's first sign of life."""
        self._store.set(_beat(self.rank), self._sign(0))

    def end(self) -> None:
        """Stop the thread that watches the other ranks."""
        self._stop.set()

    def stop(self) -> None:
        """Stop watching and giving signs of life, as the run is over."""
        self.end()
        self._threads[0].join(timeout=self.silence_s)

    def enter(self) -> None:
        """Record that the main thread has come to the next step that all ranks take, and waits for them."""
        with self._lock:
            self._step += 1
            self._waits_since = time.monotonic()

    def leave(self) -> None:
        """Record that the main thread waits no longer."""
        with self._lock:
            self._waits_since = None

    def check(self) -> None:
        """Raise RankError if the run is to end."""
        if self._fault is not None:
            self._noticed = True
            raise self._fault.error()

    def report(self, text: str) -> None:
        """Tell the others that this rank ends the run, and give them time to hear it."""
        with self._lock:
            if self._fault is None:
                self._own = self._fault = Fault(culprit=self.rank, text=f"rank {self.rank} {text}")
        self._noticed = True
        deadline = time.monotonic() + _DEAD_S
        while self._own is not None and time.monotonic() < deadline:
            time.sleep(BEAT_S / 10)
        # The others read it with their next sign of life.
        time.sleep(2 * BEAT_S)

    def lost(self, wait_s: float) -> Fault | None:
        """Wait until it is known which rank is gone, and return that fault; None if none is after `wait_s`."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and self._fault is None:
            now = time.monotonic()
            others = [rank for rank in range(self.size) if rank != self.rank]
            longest = max(others, key=lambda rank: now - self._beats[rank][1])
            if now - self._beats[longest][1] > _DEAD_S > now - self._answered:
                self._declare(longest, "is gone: it died, or it cannot be reached")
            if self._interrupted and all(value.endswith(" 1") for value, _ in self._beats):
                break
            time.sleep(BEAT_S / 5)
        self._noticed = True
        return self._fault

    def interrupted(self) -> Fault | None:
        """Record this process's interrupt; return the fault if another's death is why, None if all were interrupted."""
        self._interrupted = True
        return self.lost(2 * _DEAD_S)

    def _sign(self, count: int) -> str:
        with self._lock:
            return f"{count} {self._step} {int(self.busy)} {int(self._interrupted)}"

    def _exchange(self) -> None:
        """Give signs, read those of the others."""
        count = 0
        while not self._stop.is_set():
            count += 1
            try:
                self._store.set(_beat(self.rank), self._sign(count))
                if (own := self._own) is not None:
                    self._store.compare_set(_FAULT, "", json.dumps({"culprit": own.culprit, "text": own.text}))
                    self._own = None
                found = [value.decode() for value in self._store.multi_get([_beat(r) for r in range(self.size)])]
                fault = self._store.multi_get([_FAULT])[0] if self._store.check([_FAULT]) else b""
            except Exception as error:
                # Whatever the store's client raises: without it nobody knows anything of the others.
                if not self._stop.is_set():
                    self._declare(None, f"the store at {self._place} is gone ({_short(error)})")
                return
            now = time.monotonic()
            self._answered = now
            for rank, value in enumerate(found):
                if value != self._beats[rank][0]:
                    self._beats[rank] = (value, now)
            if fault and self._fault is None:
                self._fault = Fault(**json.loads(fault))
            self._stop.wait(BEAT_S)

    def _judge(self) -> None:
        """Declare a fault by what has come, and end the process if the main thread does not notice."""
        since: float | None = None
        while not self._stop.wait(BEAT_S / 2):
            now = time.monotonic()
            if self._fault is not None:
                since = since or now
                if not self._noticed and now - since > self.silence_s:
                    print(f"structprune: {self._fault.error()}", file=sys.stderr, flush=True)
                    os._exit(2)
            elif now - self._answered > self.silence_s:
                text = f"the store at {self._place} has not answered for {self.silence_s:g} s: is the network cut?"
                self._declare(None, text)
            else:
                self._judge_others(now)

    def _judge_others(self, now: float) -> None:
        for rank, (_, heard) in enumerate(self._beats):
            if rank != self.rank and now - heard > self.silence_s:
                self._declare(rank, f"has given no sign of life for {self.silence_s:g} s")
                return
        with self._lock:
            waits_since, step = self._waits_since, self._step
        if waits_since is None or now - waits_since <= self.timeout_s:
            return
        signs = [[int(number) for number in value.split()] if value else [0, 0, 0, 0] for value, _ in self._beats]
        behind = min((r for r in range(self.size) if r != self.rank), key=lambda r: signs[r][1])
        if now - self._beats[behind][1] > _FRESH_S:
            # Not known to be alive: it is heard again, or its silence ends the run.
            return
        _, reached, busy, _ = signs[behind]
        limit_s = self.timeout_s * (_TASK_PATIENCE if busy else 1)
        if reached >= step:
            self._declare(None, f"step {step} has not ended for {self.timeout_s:g} s: is a link between ranks cut?")
        elif now - waits_since > limit_s:
            self._declare(behind, f"is alive but has not come to step {step} for {limit_s:g} s")

    def _declare(self, culprit: int | None, text: str) -> None:
        with self._lock:
            if self._fault is None:
                named = text if culprit is None else f"rank {culprit} {text}"
                self._own = self._fault = Fault(culprit=culprit, text=named)


def prepare(store: Store) -> None:
    """Clear the fault in the store; the first rank does this before any watch starts."""
    store.set(_FAULT, "")


_FAULT = "fault"


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _short(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
