"""Lazy registries: a name maps to `"module:ATTRIBUTE"`, imported on first use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

from structprune.errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind, which say of themselves what they are. Adding one is one line where it is declared."""

    def __init__(self, kind: str, entries: Mapping[str, str], *, aliases: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._entries = dict(entries)
        self._aliases = dict(aliases or {})
        """Former name -> name; recipes and reports that have it keep their meaning."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, without the former ones."""
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._aliases

    def __or__(self, other: Registry[Any]) -> Registry[Any]:
        """The names of both, under the kind of the first."""
        return Registry(self.kind, {**self._entries, **other._entries}, aliases={**self._aliases, **other._aliases})

    def check(self, name: str) -> str:
        """Return the name of the entry, the present one for a former one. Raises InputError with the nearest name."""
        name = self._aliases.get(name, name)
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"unknown {self.kind} {name!r}", do=f"{hint}known: {', '.join(self._entries)}")
        return name

    def get(self, name: str) -> T:
        """Import and return the entry. Raises InputError for an unknown name."""
        module, _, attribute = self._entries[self.check(name)].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))

    def find(self, name: str | None) -> T | None:
        """Get the entry; None without a name or for an unknown one, as a report of another version may have it."""
        return None if name is None or name not in self else self.get(name)
