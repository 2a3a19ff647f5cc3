"""Lazy registries: a name maps to `"module:attribute"`, imported on first use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

from structprune.errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named extension points of one kind. Adding one is one line where the registry is declared."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __or__(self, other: Registry[Any]) -> Registry[Any]:
        """The names of both, under the kind of the first."""
        return Registry(self.kind, {**self._entries, **other._entries})

    def check(self, name: str) -> str:
        """Return `name` if it is registered. Raises InputError with the nearest name otherwise."""
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"unknown {self.kind} {name!r}", do=f"{hint}known: {', '.join(self._entries)}")
        return name

    def get(self, name: str) -> T:
        """Import and return the entry."""
        module, _, attribute = self._entries[self.check(name)].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))
