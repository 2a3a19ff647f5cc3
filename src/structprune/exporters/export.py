"""What every exporter gets and gives; an exporter is a function from the one to the other, registered by format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from structprune.checkpoint.reader import CheckpointReader

EXPORT_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """One checkpoint directory and the file, or directory, that is to be made of it."""

    reader: CheckpointReader
    output: Path
    """Does not exist yet."""
    name: str
    """What the model is called inside the file."""
    dtype: str
    """float32, float16, bfloat16, or `stored`: as in the checkpoint, float32 where it has several."""
    tokenizer_gguf: Path | None
    """A GGUF file whose tokenizer was asked for."""
    source_gguf: Path | None
    """The GGUF file that the model comes from."""
    note: Callable[[str], None]
    """Called with what the user should know."""
    start: Callable[[int], None]
    """Called once with the number of steps."""
    advance: Callable[[str], None]
    """Called after each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What was written."""

    format: str
    path: str
    architecture: str
    dtype: str
    num_tensors: int
    bytes: int
    tokenizer: str
    """The file or directory that the tokenizer comes from."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


Exporter = Callable[[ExportRequest], ExportResult]
