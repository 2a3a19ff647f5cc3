"""What a model's README states for programs: the front matter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

README_NAME = "README.md"


def source_metadata(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Licence, languages and origin of the model in `directory`, from its README's front matter or its config.

    With `unreadable` where there is a front matter that is no YAML mapping.
    """
    path = directory / README_NAME
    found: dict[str, Any] = {}
    if path.is_file():
        try:
            found = metadata_load(path) or {}
        except (ValueError, yaml.YAMLError):
            found = {"unreadable": True}
    if "license" not in found and isinstance(config.get("license"), str):
        found["license"] = config["license"]
    return found
