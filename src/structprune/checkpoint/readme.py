"""What a model's README states for programs: the front matter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

README_NAME = "README.md"
# The front matter stands at the start; a longer one is data that is none of ours.
_MAX_BYTES = 2**18
_MAX_TEXT = 500
_MARK = "---"
# Entries that are read, each a text or a list of texts.
_ENTRIES = ("license", "license_name", "license_link", "language", "datasets", "base_model", "pipeline_tag")


def source_metadata(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read licence, languages and origin of the model in `directory` from its README's front matter or its config.

    The entry `unreadable` is set for a front matter that is no YAML mapping, or has entries that are no texts.
    """
    path = directory / README_NAME
    found: dict[str, Any] = {}
    if path.is_file():
        try:
            found = _read(path)
        except (OSError, ValueError, TypeError, RecursionError, AttributeError, yaml.YAMLError):
            # PyYAML's constructors raise more than YAMLError.
            found = {"unreadable": True}
    if "license" not in found and is_text(config.get("license")):
        found["license"] = config["license"]
    return found


def is_text(value: object) -> bool:
    """Whether it is a text that fits into a line of a model card."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= _MAX_TEXT
        and all(character.isprintable() and character not in "<>" for character in value)
    )


def _read(path: Path) -> dict[str, Any]:
    """Read the entries of the front matter; raises what YAML raises, and ValueError for what is none."""
    with path.open("rb") as handle:
        start = handle.read(_MAX_BYTES)
    lines = start.decode("utf-8-sig", "ignore" if len(start) == _MAX_BYTES else "strict").splitlines()
    if not lines or lines[0].rstrip() != _MARK:
        return {}
    end = next((number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == _MARK), None)
    if end is None:
        raise ValueError("the front matter has no end")
    entries = yaml.safe_load("\n".join(lines[1:end]))
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise ValueError("the front matter is no mapping")
    given = {name: entries[name] for name in _ENTRIES if entries.get(name)}
    usable = {name: value for name, value in given.items() if is_text(value) or _are_texts(value)}
    return usable if usable == given else usable | {"unreadable": True}


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_TEXT and all(map(is_text, value))
