"""The checkpoint's own tokenizer, reduced to what the rest needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from structprune.errors import CheckpointError, first_line

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def tokenizer_bytes(directory: Path) -> int:
    """Bytes of the files that a tokenizer in `directory` is read from."""
    return sum(path.stat().st_size for name in _FILES if (path := directory / name).is_file())


class TextEncoder:
    """Text -> token ids, without special tokens. Raises CheckpointError if the directory holds no tokenizer."""

    def __init__(self, directory: Path) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:
            # The loader's exception types differ between tokenizer classes; each means the same to the user.
            raise CheckpointError(
                "the tokenizer cannot be loaded",
                where=str(directory),
                got=first_line(error),
                do="copy its files there",
            ) from error

    def encode(self, text: str) -> Tensor:
        """Token ids of `text`, int64, shape (tokens,)."""
        # Long text is split at line ends: tokenizers take superlinear time on one huge string. As tensors, because a
        # list takes five times the memory.
        ids = [torch.empty(0, dtype=torch.int64)]
        for chunk in _chunks(text, 200_000):
            found = self.tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
            ids.append(torch.tensor(found, dtype=torch.int64))
        return torch.cat(ids)

    def decode(self, ids: Tensor) -> str:
        """Token ids -> text."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """The token that starts a text, or None."""
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if isinstance(value, int):
                return value
        return None


def _chunks(text: str, size: int) -> list[str]:
    chunks: list[str] = []
    start = 0
    while start < len(text):
        end = len(text) if start + size >= len(text) else text.rfind("\n", start, start + size) + 1
        if end <= start:
            end = min(start + size, len(text))
        chunks.append(text[start:end])
        start = end
    return chunks
