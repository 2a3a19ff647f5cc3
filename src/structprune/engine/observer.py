"""How a run tells the outside what it is doing."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Receives progress; never decides anything."""

    def note(self, text: str) -> None:
        """One line that the user should see."""
        ...

    def start(self, phase: str, total: int) -> None:
        """A phase of `total` steps begins."""
        ...

    def advance(self, detail: str) -> None:
        """One step of the phase is done."""
        ...


class SilentObserver:
    """Says nothing."""

    def note(self, text: str) -> None: ...

    def start(self, phase: str, total: int) -> None: ...

    def advance(self, detail: str) -> None: ...
