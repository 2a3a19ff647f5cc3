"""The checkpoint's own tokenizer, reduced to what the rest needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from structprune.architectures.stock.loading import without_global_width_warnings
from structprune.errors import CheckpointError, InputError, first_line
from structprune.kinds import StartToken
from structprune.types import Render

_Encoded = TypeVar("_Encoded")
# Characters that are encoded in one call, and how many of these at once.
_CHUNK, _AT_ONCE = 200_000, 8
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


# Code of a checkpoint is never run, so there is no flag that would allow it.
_OWN_CODE = (
    "this tokenizer is code that lies in the checkpoint, and such code is never run here; if you trust it, load it "
    "with AutoTokenizer and trust_remote_code=True and save it as tokenizer.json, by `save_pretrained` into the "
    "folder, then remove auto_map from tokenizer_config.json"
)


def tokenizer_bytes(directory: Path) -> int:
    """Return the bytes of the files that a tokenizer in `directory` is read from."""
    return sum(path.stat().st_size for name in _FILES if (path := directory / name).is_file())


class TextEncoder:
    """Text -> token ids, without special tokens. Raises CheckpointError if the directory holds no tokenizer."""

    def __init__(self, directory: Path, num_rows: int | None = None, config: PretrainedConfig | None = None) -> None:
        self.directory = directory
        self.num_rows = num_rows
        """Rows of the embedding that ids are looked up in; None: not checked."""
        # Without `config` the loader reads it itself, and fails where an entry was corrected.
        try:
            with without_global_width_warnings():
                self.tokenizer: Any = AutoTokenizer.from_pretrained(
                    str(directory), local_files_only=True, trust_remote_code=False, config=config
                )
        except BaseException as error:
            # The loader's exception types differ between tokenizer classes; each means the same to the user.
            _raise_other(error)
            is_there = tokenizer_bytes(directory) > 0
            raise CheckpointError(
                "the tokenizer cannot be loaded",
                where=str(directory),
                got=first_line(error) if is_there else f"none of {', '.join(_FILES)}",
                do=_OWN_CODE
                if "custom code" in str(error)
                else "copy its files there again; one of them is damaged, or of a newer version"
                if is_there
                else "copy its files there",
            ) from error

    def encode(self, text: str) -> Tensor:
        """Encode `text` as token ids, int64, shape (tokens,).

        Raises CheckpointError where the tokenizer cannot encode it, or gives a token that the embedding has no row for.
        """
        # Long text is split at line ends: tokenizers take superlinear time on one huge string. As tensors, because a
        # list takes five times the memory.
        pieces = (self._encode(chunk) for chunk in _chunks(text, _CHUNK))
        return torch.cat([torch.empty(0, dtype=torch.int64), *pieces])

    def encoded_together(self, text: str) -> Iterator[Tensor]:
        """Yield what `encode` returns, in pieces, several of which are encoded at once where there are cores.

        Raises CheckpointError as `encode` does.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        chunks = _chunks(text, _CHUNK)
        if backend is None:
            yield from map(self._encode, chunks)
            return
        # Its file may ask for either.
        backend.no_truncation()
        backend.no_padding()
        for first in range(0, len(chunks), _AT_ONCE):
            several = chunks[first : first + _AT_ONCE]
            encode = partial(backend.encode_batch_fast, several, add_special_tokens=False)
            for found in self._tried(encode, several[0]):
                ids = torch.tensor(found.ids, dtype=torch.int64)
                self._check_rows(ids)
                yield ids

    def _encode(self, text: str) -> Tensor:
        found = self._tried(lambda: self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], text)
        ids = torch.tensor(found, dtype=torch.int64)
        self._check_rows(ids)
        return ids

    def _tried(self, encode: Callable[[], _Encoded], text: str) -> _Encoded:
        """Call what encodes. Raises CheckpointError that quotes the start of the text."""
        try:
            return encode()
        except BaseException as error:
            # As where a regular expression backtracks without end.
            _raise_other(error)
            # It raises bare exceptions, such as for a character without an unknown token to stand for it.
            raise CheckpointError(
                "the tokenizer cannot encode the text",
                where=str(self.directory),
                got=f"{first_line(error)} in {_excerpt(text)}",
                do="check that its files belong to the model; a vocabulary needs an unknown token or all characters",
            ) from error

    def _check_rows(self, ids: Tensor) -> None:
        """Raise CheckpointError for a token that the embedding has no row for."""
        if self.num_rows is not None and len(ids) and int(ids.max()) >= self.num_rows:
            token = int(ids.max())
            raise CheckpointError(
                "the text has a token that the embedding has no row for",
                where=str(self.directory),
                got=f"token {token} ({self.tokenizer.convert_ids_to_tokens(token)!r})",
                wanted=f"tokens below {self.num_rows}, the rows of the embedding",
                do="use the tokenizer that the model was saved with, or a text without that token",
            )

    def start_ids(self, asked: StartToken) -> tuple[int, ...]:
        """Return what is put in front of a text: by default what the tokenizer itself puts there.

        Raises InputError where a start token is asked for and there is none, CheckpointError where the tokenizer cannot
        be asked or the embedding has no row for it.
        """
        if asked == "no":
            return ()
        ids = self._own_start()
        if not ids and asked == "yes":
            if not isinstance(self.tokenizer.bos_token_id, int):
                raise InputError(
                    "the tokenizer has no start token", where=str(self.directory), got="--bos yes", wanted="--bos no"
                )
            ids = (self.tokenizer.bos_token_id,)
        self._check_rows(torch.tensor(ids, dtype=torch.int64))
        return ids

    def _own_start(self) -> tuple[int, ...]:
        """Return what the tokenizer puts in front of a text that it encodes with special tokens."""
        for text in self._probes():
            try:
                alone = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                whole = self.tokenizer(text, verbose=False)["input_ids"]
            except Exception:
                # A vocabulary without an unknown token cannot encode what it lacks; the next may be in it.
                continue
            for first in range(len(whole) - len(alone) + 1 if alone else 0):
                if whole[first : first + len(alone)] == alone:
                    return tuple(whole[:first])
        raise CheckpointError(
            "the tokenizer does not show whether a text begins with a start token",
            where=str(self.directory),
            do="say it with --bos yes or --bos no",
        )

    def _probes(self) -> Iterator[str]:
        """Yield texts of a token or two, of which the tokenizer can encode at least one."""
        yield "a"
        for token in range(min(len(self.tokenizer), 512)):
            text = self.tokenizer.decode([token], skip_special_tokens=True)
            if text.strip():
                yield text

    def spelled(self, ids: Sequence[int]) -> str:
        """Write tokens as the vocabulary spells them."""
        return "".join(map(str, self.tokenizer.convert_ids_to_tokens(list(ids))))

    @property
    def render(self) -> Render | None:
        """What writes a chat as the model's template does, and raises InputError for turns that it refuses; None
        without a template."""
        return None if self.tokenizer.chat_template is None else self._render

    def _render(self, turns: Sequence[Mapping[str, str]]) -> str:
        try:
            return self.tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=False)
        except Exception as error:
            # Templates raise what they like: Jinja's types, or an exception of their own for turns in another order.
            raise InputError("the chat template refuses these turns", got=first_line(error)) from error

    def decode(self, ids: Tensor) -> str:
        """Decode token ids to text."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """The token that starts a text, or None."""
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self.tokenizer, name, None)
            if isinstance(value, int):
                return value
        return None


def _raise_other(error: BaseException) -> None:
    """Raise what is no error of a tokenizer, such as an interrupt; a panic of the Rust library is no Exception."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _excerpt(text: str) -> str:
    """Quote the start of the text, short and on one line."""
    return repr(text[:40] + ("..." if len(text) > 40 else ""))


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
