"""A text model inside the checkpoint of a larger one: what is around it, and how its results are put back there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

_TIED = "tie_word_embeddings"


class Whole(Protocol):
    """What is asked of the reader of the whole checkpoint."""

    shapes: dict[str, tuple[int, ...]]

    @property
    def dtypes(self) -> dict[str, torch.dtype]: ...
    @property
    def files(self) -> list[Path]: ...
    @property
    def weight_files(self) -> set[str]: ...
    def num_bytes(self, names: Iterable[str]) -> int: ...
    def path_of(self, name: str) -> Path: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """The checkpoint that a text model was found in, of which a reader shows the text model alone."""

    whole: Whole
    """The checkpoint with the names of its files."""
    key: str
    """Entry of the config that holds the text model's."""
    config: Mapping[str, Any]
    """config.json of the whole, with the text model's config under `key`."""
    text_config: Mapping[str, Any]
    """The text model's config as it was read, every entry written out."""
    inside: frozenset[str]
    """Stored names of the text model's tensors."""
    enters_between_blocks: bool
    """Whether blocks of the text model are given more than the stream of the block before them, as of images."""

    def embedded(self, text_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json of the whole with `text_config` in it: entries that did not change stay as they were."""
        before: Mapping[str, Any] = self.config[self.key]
        if text_config.get("model_type") != self.text_config.get("model_type"):
            # What is left out means something else for another class.
            before = text_config
        inner = {name: value for name, value in before.items() if name in text_config or name not in self.text_config}
        for name, value in text_config.items():
            if name not in self.text_config or value != self.text_config[name]:
                inner[name] = value
        # What was left out of the text model's config had no meaning beside its weights.
        gone = self.text_config.keys() - text_config.keys()
        result = {name: value for name, value in self.config.items() if name not in gone} | {self.key: inner}
        # Stock code ties by the entry of the whole, older versions by that of the text model.
        if text_config.get(_TIED) != self.text_config.get(_TIED):
            result[_TIED] = text_config[_TIED]
        return result

    @property
    def around(self) -> list[str]:
        """Stored names of the tensors around the text model."""
        return [name for name in self.whole.shapes if name not in self.inside]
