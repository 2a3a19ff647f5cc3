"""Lazy registries: a name maps to `"module:ATTRIBUTE"`, imported on first use; other packages add names of their own.

A package that is installed beside this one declares an entry point in the group of a registry, such as
`structprune.scores`; its entries stand behind ours (docs/extend.md).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any, Generic, TypeVar

from structprune.errors import InputError, UnsupportedError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind, which say of themselves what they are. Adding one is one line where it is declared."""

    def __init__(
        self,
        kind: str,
        entry: type[T],
        entries: Mapping[str, str],
        *,
        aliases: Mapping[str, str] | None = None,
        group: str | None = None,
        reserved: Collection[str] = (),
    ) -> None:
        self.kind = kind
        self._entry = entry
        self._own = dict(entries)
        self._aliases = dict(aliases or {})
        """Former name -> name; recipes and reports that have it keep their meaning."""
        self._group = group
        """Group of the entry points by which other packages add to it; None: they cannot."""
        self._taken = {*self._own, *self._aliases, *reserved}
        """Names that other packages cannot have, among them those that mean something else in the same setting."""

    @cached_property
    def _outside(self) -> dict[str, importlib.metadata.EntryPoint]:
        """Entries of other packages by name. Raises InputError for a name that is taken."""
        found: dict[str, importlib.metadata.EntryPoint] = {}
        points = importlib.metadata.entry_points(group=self._group) if self._group else ()
        for point in points:
            taken = "structprune" if point.name in self._taken else None
            if point.name in found and found[point.name].value != point.value:
                taken = _package(found[point.name])
            if taken:
                raise InputError(
                    f"the {self.kind} {point.name!r} is there already",
                    where=f"entry point of {_package(point)}, group {self._group}",
                    got=point.value,
                    wanted=f"another name: this one is that of {taken}",
                    do=f"rename it in {_package(point)}, or uninstall that",
                )
            found[point.name] = point
        return found

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, without the former ones: ours, then those of other packages."""
        return iter((*self._own, *self._outside))

    def __contains__(self, name: object) -> bool:
        # The others first: a name that is there twice is an error whichever is asked for.
        return name in self._outside or name in self._own or name in self._aliases

    def check(self, name: str, *others: Registry[Any]) -> str:
        """Return the name of the entry, the present one for a former one.

        Raises InputError with the nearest name for one that neither this registry nor any of `others` has.
        """
        for registry in (self, *others):
            if name in registry:
                return registry._aliases.get(name, name)
        known = [each for registry in (self, *others) for each in registry]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown {self.kind} {name!r}", do=f"{hint}known: {', '.join(known)}")

    def get(self, name: str) -> T:
        """Import and return the entry. Raises InputError for an unknown name, and for what another package broke."""
        name = self.check(name)
        if name in self._own:
            module, _, attribute = self._own[name].partition(":")
            entry = getattr(importlib.import_module(module), attribute)
            assert isinstance(entry, self._entry), f"{name} is no {self._entry.__name__}"
            return entry
        point = self._outside[name]
        where = f"entry point of {_package(point)}, group {self._group}"
        try:
            entry = point.load()
        except (ImportError, AttributeError) as error:
            raise InputError(f"the {self.kind} {name!r} cannot be imported", where=where, got=str(error)) from error
        if not isinstance(entry, self._entry):
            wanted = f"{self._entry.__module__}.{self._entry.__name__}"
            raise InputError(
                f"the {self.kind} {name!r} is none", where=where, got=type(entry).__name__, wanted=f"a {wanted}"
            )
        return entry

    def find(self, name: str | None) -> T | None:
        """Get the entry; None without a name or for an unknown one, as a report of another version may have it."""
        return None if name is None or name not in self else self.get(name)


def _package(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


def check_installed(what: str, packages: Collection[str], extra: str) -> None:
    """Raise UnsupportedError if a package is missing that `what` needs; `extra` is what is installed to have them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"{what} needs further packages", got=f"no {', no '.join(missing)}", do=f"pip install '{extra}'"
        )
