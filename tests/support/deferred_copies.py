"""A device's copies and computations (`structprune.engine.streaming.transfer.CopyStream`), as late as they may be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Event:
    """Something that happens once, when it is waited for and not before."""

    def __init__(self, happen: Callable[[], object]) -> None:
        self._happen: Callable[[], object] | None = happen
        self._lock = threading.Lock()

    def synchronize(self) -> None:
        with self._lock:
            if self._happen is not None:
                self._happen()
                self._happen = None


class DeferredCopyStream:
    """A device that does everything at the last moment: until then what it makes holds nothing of use.

    What is computed waits in a queue for someone to ask for a result; copies there wait until they are needed.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.pieces: list[Tensor] = []
        self.queue: list[Event] = []

    def page_locked(self, num_bytes: int) -> Tensor:
        self.pieces.append(torch.empty(num_bytes, dtype=torch.uint8))
        return self.pieces[-1]

    def bring(self, staged: Tensor) -> tuple[Tensor, Event]:
        brought = torch.full_like(staged, torch.nan, device=self.device)
        return brought, Event(lambda: brought.copy_(staged))

    def receive(self, brought: Tensor, event: Event) -> None:
        self.queue.append(event)

    def compute(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        result = torch.full_like(x, torch.nan)
        self.queue.append(Event(lambda: result.copy_(function(x))))
        return result

    def send(self, computed: Tensor, staged: Tensor) -> Event:
        staged.fill_(torch.nan)
        before = list(self.queue)

        def happen() -> None:
            self.finish(before)
            staged.copy_(computed)

        return Event(happen)

    def finish(self, events: Iterable[Event] | None = None) -> None:
        for event in self.queue if events is None else events:
            event.synchronize()
