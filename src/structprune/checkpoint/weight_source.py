"""What the checkpoint reader asks of weights that are made of something else than safetensors files of the folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

STORED_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Name of a dtype in a safetensors file -> dtype."""


def dtype_code(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a safetensors file."""
    return next(code for code, stored in STORED_DTYPES.items() if stored == dtype)


def names_by_bytes(sizes: Iterable[tuple[torch.dtype, int]]) -> list[str]:
    """Name the dtypes of pairs (dtype, bytes), that of the most bytes first."""
    total: Counter[torch.dtype] = Counter()
    for dtype, num_bytes in sizes:
        total[dtype] += num_bytes
    return [str(dtype).removeprefix("torch.") for dtype, _ in total.most_common()]


class WeightSource(Protocol):
    """What answers as an open safetensors file does, whatever its tensors are made of."""

    def __iter__(self) -> Iterator[str]:
        """Yield the tensors' names."""
        ...

    def get_slice(self, name: str) -> Any:
        """Return the tensor `name`, of which rows can be read, as a safetensors file has it."""
        ...

    def in_width(self, dtype: torch.dtype) -> WeightSource:
        """Return the same, read in `dtype`."""
        ...

    def path_of(self, name: str) -> Path:
        """Return the file that holds the tensor, or most of it."""
        ...

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files of weights."""
        ...

    @property
    def content_files(self) -> tuple[Path, ...]:
        """Further files that decide what the weights are."""
        ...

    @property
    def content(self) -> str:
        """What tells two of the same names, shapes and sizes apart; empty where sizes do."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """What reading holds beside the tensor that is read, at most."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FewerTokens:
    """Tokens that were taken out of the vocabulary."""

    before: int
    """Rows of the embedding."""
    after: int
    parameters: int
    """Numbers that went with them."""
    parameters_before: int
    """Numbers of all rows."""
    covered: float
    """Share of the tokens of the texts, that the choice was made by, that stay."""
    texts: tuple[str, ...]
    num_tokens: int
    """Tokens of those texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedAdapter:
    """An adapter that was merged into the weights."""

    path: str
    content: str
    """SHA-256 of its weights and settings."""
    num_updated: int
    """Tensors that a low-rank product was added to."""
    num_replaced: int
    """Tensors that the adapter has in whole."""
