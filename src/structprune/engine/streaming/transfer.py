"""Moves windows between their stores and the device that blocks run on, beside the computation where it can.

On the host there is nothing to move. For a device one thread copies between stores and page-locked memory, and the
device's own queues (streams) copy between that and the device: while one micro-batch is computed the next one is on its
way there and the last one's output on its way back. Two pieces of page-locked memory each way, of one micro-batch.

Shape suffixes: B windows of one micro-batch, S positions, D hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from structprune.calibration.store import HiddenStore

Put = Callable[[int, Tensor], None]
"""(first window, (B, S, D) on the device)."""


class WindowTransfer(Protocol):
    """How the windows of stores come to the device and back."""

    def read(self, store: HiddenStore, batches: Iterable[tuple[int, int]]) -> Generator[tuple[int, int, Tensor]]:
        """Yield (start, stop, the windows on the device) for each of `batches`.

        What the loop over them writes may not be in a batch that is still to come.
        """
        ...

    def writing(self, store: HiddenStore) -> AbstractContextManager[Put]:
        """Store what is put inside the context, at the latest at its end."""
        ...

    def fetch(self, store: HiddenStore, start: int, stop: int) -> Tensor:
        """Fetch some windows to the device, at once."""
        ...


class CopyEvent(Protocol):
    """The end of one copy."""

    def synchronize(self) -> None:
        """Wait for it."""
        ...


class CopyStream(Protocol):
    """What a device does beside its computation."""

    def page_locked(self, num_bytes: int) -> Tensor:
        """Allocate host memory that the device can copy from and to by itself, uint8."""
        ...

    def bring(self, staged: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy to the device; the copy, and its event for `receive` and `synchronize`."""
        ...

    def receive(self, brought: Tensor, event: Any) -> None:
        """Let what is computed from now on wait for it."""
        ...

    def send(self, computed: Tensor, staged: Tensor) -> CopyEvent:
        """Begin to copy to `staged` what is being computed; its event there."""
        ...


def transfer_for(device: torch.device) -> WindowTransfer:
    """Choose the transfer that suits the device."""
    return DeviceTransfer(CudaCopyStream(device)) if device.type == "cuda" else DirectTransfer(device)


class DirectTransfer:
    """Reads and writes when it is asked to."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self, store: HiddenStore, batches: Iterable[tuple[int, int]]) -> Generator[tuple[int, int, Tensor]]:
        for start, stop in batches:
            yield start, stop, self.fetch(store, start, stop)

    @contextmanager
    def writing(self, store: HiddenStore) -> Generator[Put]:
        yield lambda start, output_BSD: store.write(start, output_BSD.cpu())

    def fetch(self, store: HiddenStore, start: int, stop: int) -> Tensor:
        return store.read(start, stop).to(self._device)


class _Staging:
    """Two pieces of page-locked memory that are used in turn, each when what it was used for is over."""

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._pieces: list[Tensor | None] = [None, None]
        self._users: list[Callable[[], object] | None] = [None, None]
        self._turn = 0

    def next(self, like: Tensor) -> Tensor:
        """Return a piece of that shape and dtype; it is free again when what `used_until` is told is over."""
        self._turn = 1 - self._turn
        if (over := self._users[self._turn]) is not None:
            over()
            self._users[self._turn] = None
        num_bytes = like.numel() * like.element_size()
        piece = self._pieces[self._turn]
        if piece is None or len(piece) < num_bytes:
            piece = self._pieces[self._turn] = self._stream.page_locked(num_bytes)
        return piece[:num_bytes].view(like.dtype).view(like.shape)

    def used_until(self, over: Callable[[], object]) -> None:
        """Mark the piece that was returned last as in use until `over` returns."""
        self._users[self._turn] = over


class DeviceTransfer:
    """Copies beside the computation. All stores are read and written by one thread, so they need no locks."""

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="transfer")

    def read(self, store: HiddenStore, batches: Iterable[tuple[int, int]]) -> Generator[tuple[int, int, Tensor]]:
        staging, left = _Staging(self._stream), iter(batches)
        asked: deque[tuple[int, int, Future[tuple[Tensor, Any]]]] = deque()

        def ask() -> None:
            if (batch := next(left, None)) is not None:
                asked.append((*batch, self._worker.submit(self._bring, store, *batch, staging)))

        try:
            ask()
            while asked:
                start, stop, coming = asked.popleft()
                brought, event = coming.result()
                ask()
                self._stream.receive(brought, event)
                yield start, stop, brought
                del brought, coming
        finally:
            # The store may be closed next.
            wait([coming for *_, coming in asked])

    def _bring(self, store: HiddenStore, start: int, stop: int, staging: _Staging) -> tuple[Tensor, Any]:
        hidden_BSD = store.read(start, stop)
        staged_BSD = staging.next(hidden_BSD)
        staged_BSD.copy_(hidden_BSD)
        brought, event = self._stream.bring(staged_BSD)
        staging.used_until(event.synchronize)
        return brought, event

    @contextmanager
    def writing(self, store: HiddenStore) -> Generator[Put]:
        staging = _Staging(self._stream)
        written: deque[Future[None]] = deque()

        def put(start: int, output_BSD: Tensor) -> None:
            while written and written[0].done():
                written.popleft().result()
            staged_BSD = staging.next(output_BSD)
            event = self._stream.send(output_BSD, staged_BSD)
            written.append(self._worker.submit(self._write, store, start, staged_BSD, event))
            staging.used_until(written[-1].result)

        try:
            yield put
        except BaseException:
            wait(written)
            raise
        for done in written:
            done.result()

    def _write(self, store: HiddenStore, start: int, staged_BSD: Tensor, event: CopyEvent) -> None:
        event.synchronize()
        store.write(start, staged_BSD)

    def fetch(self, store: HiddenStore, start: int, stop: int) -> Tensor:
        ((_, _, hidden_BSD),) = self.read(store, [(start, stop)])
        return hidden_BSD


class CudaCopyStream:
    """A stream each way beside the one that computes (CUDA Programming Guide, "Asynchronous Concurrent Execution")."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._there, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def page_locked(self, num_bytes: int) -> Tensor:
        # A thread begins at the first device, which would be set up for this process too.
        with torch.cuda.device(self._there.device):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def bring(self, staged: Tensor) -> tuple[Tensor, CopyEvent]:
        with torch.cuda.stream(self._there):
            brought = staged.to(self._device, non_blocking=True)
            return brought, self._there.record_event()

    def receive(self, brought: Tensor, event: torch.cuda.Event) -> None:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(event)
        # Its memory belongs to the other stream, which may not have it back before this one is through with it.
        brought.record_stream(computing)

    def send(self, computed: Tensor, staged: Tensor) -> CopyEvent:
        self._back.wait_event(torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(self._back):
            staged.copy_(computed, non_blocking=True)
            event = self._back.record_event()
        computed.record_stream(self._back)
        return event
