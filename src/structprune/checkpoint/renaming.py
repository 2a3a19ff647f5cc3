"""Other names for a checkpoint's tensors than its files have, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol


class Renaming(Protocol):
    """Other names for tensors."""

    def wanted(self, stored: str) -> str:
        """Return the other name of a tensor that is called `stored`."""
        ...

    def stored(self, wanted: str) -> str:
        """Return what a tensor of this other name is called, whether it is there or not."""
        ...


class Starts:
    """Other starts of names: the first of the pairs, stored -> wanted, that fits is exchanged."""

    def __init__(self, prefixes: Mapping[str, str]) -> None:
        self._pairs = list(prefixes.items())

    def wanted(self, stored: str) -> str:
        """Return the name with the other start."""
        return _exchanged(stored, self._pairs)

    def stored(self, wanted: str) -> str:
        """Return the name with the start that it had."""
        return _exchanged(wanted, [(new, old) for old, new in self._pairs])


class Labels:
    """Other names for single tensors, stored -> wanted."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._wanted = dict(names)
        self._stored = {wanted: stored for stored, wanted in names.items()}

    def wanted(self, stored: str) -> str:
        """Return the tensor's other name, its own without one."""
        return self._wanted.get(stored, stored)

    def stored(self, wanted: str) -> str:
        """Return the tensor's own name."""
        return self._stored.get(wanted, wanted)


def _exchanged(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
