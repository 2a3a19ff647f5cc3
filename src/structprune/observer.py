"""How a run tells the outside what it is doing."""

from __future__ import annotations

from typing import Protocol

from structprune.memory import PeakMeter


class Observer(Protocol):
    """Receives progress; never decides anything."""

    def note(self, text: str) -> None:
        """Show one line that the user should see."""
        ...

    def start(self, phase: str, total: int) -> None:
        """Begin a phase of `total` steps."""
        ...

    def advance(self, detail: str) -> None:
        """Record that one step of the phase is done."""
        ...


class SilentObserver:
    """Says nothing."""

    def note(self, text: str) -> None: ...

    def start(self, phase: str, total: int) -> None: ...

    def advance(self, detail: str) -> None: ...


class MarkingObserver:
    """Passes everything on, and marks the end of each step in the meter: memory over time, by phase."""

    def __init__(self, inner: Observer, meter: PeakMeter) -> None:
        self._inner = inner
        self._meter = meter
        self._phase = "set-up"

    def note(self, text: str) -> None:
        self._inner.note(text)

    def start(self, phase: str, total: int) -> None:
        self._meter.mark(self._phase)
        self._phase = phase
        self._inner.start(phase, total)

    def advance(self, detail: str) -> None:
        self._meter.mark(self._phase)
        self._inner.advance(detail)
