"""What an exporter is, what it gets, and what it gives; registered by format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import InputError, UnsupportedError
from structprune.registry import check_installed

EXPORT_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


TEXT_ALONE = "the text model alone is exported: what reads images, around it, is left out"


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
        """Return the fields as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporter:
    """A format that a checkpoint can be written in for another runtime."""

    export: Callable[[ExportRequest], ExportResult]
    """Raises a subclass of StructPruneError; what it writes appears whole or not at all."""
    packages: tuple[str, ...]
    """Modules that it imports beside the dependencies of structprune."""
    extra: str
    """What is installed to have them: `structprune[gguf]`."""
    suffix: str = ""
    """Ending of the file; none where the output is a directory."""
    dtypes: tuple[str, ...] = tuple(EXPORT_DTYPES)
    """Dtypes that it writes."""
    copies_tokenizer: bool = False
    """Whether it can take the tokenizer from a GGUF file."""

    def check(self, format: str, request: ExportRequest) -> None:
        """Raise InputError for a setting that this format does not have, UnsupportedError for a missing package."""
        check_installed(f"writing {format}", self.packages, self.extra)
        if request.dtype not in ("stored", *self.dtypes):
            raise UnsupportedError(
                f"{format.upper()} files are written in {', '.join(self.dtypes)}",
                got=request.dtype,
                do=f"pass --dtype {self.dtypes[0]}",
            )
        if request.tokenizer_gguf is not None and not self.copies_tokenizer:
            raise InputError(
                f"--format {format} takes no tokenizer from a GGUF file", got="--tokenizer-gguf", do="leave it out"
            )
        if self.suffix and request.output.suffix != self.suffix:
            name = request.output.name
            raise InputError(f"a file of this format ends in {self.suffix}", got=name, wanted=f"{name}{self.suffix}")
