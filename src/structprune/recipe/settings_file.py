"""Recipes in YAML: a mapping of settings, read before anything of it is believed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from structprune.errors import InputError
from structprune.files import check_path, check_regular


def _named_twice(text: str) -> list[str]:
    """List the entries that a YAML mapping has more than once, at any depth: a loader takes the last without a word."""
    waiting, seen, twice = [yaml.compose(text, Loader=yaml.SafeLoader)], set[int](), list[str]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            # An alias; it may even name a node that it lies in.
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            names = [str(key.value) for key, _ in node.value]
            twice += [name for name in dict.fromkeys(names) if names.count(name) > 1]
            waiting += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return twice


def read_yaml(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Read a YAML mapping of fields, of those that are known, not yet validated. Raises InputError."""
    check_path(path, "the recipe file")
    try:
        check_regular(path)
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
        twice = _named_twice(text)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("the recipe file does not exist", where=str(path)) from None
    except Exception as error:
        # PyYAML's constructors raise ValueError, TypeError, RecursionError and more beside YAMLError.
        raise InputError(
            "the recipe file cannot be read as YAML", where=str(path), got=" ".join(str(error).split())
        ) from None
    if data is None:
        data = {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise InputError(
            "a recipe must be a mapping",
            where=str(path),
            got=type(data).__name__,
            wanted="lines such as `sparsity: 0.3`",
        )
    if twice:
        raise InputError(f"the recipe has the field {twice[0]!r} twice", where=str(path), do="remove one of the lines")
    names = list(known)
    if unknown := sorted(set(data) - set(names)):
        raise InputError(f"unknown recipe field {unknown[0]!r}", where=str(path), do=f"known: {', '.join(names)}")
    return data
