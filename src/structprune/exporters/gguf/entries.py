"""What the metadata entries of a tokenizer are made with, whichever kind of tokenizer it is."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structprune.errors import CheckpointError

ADVICE = "pass --tokenizer-gguf with a GGUF file of the dense model, whose tokenizer is copied"
"""What to do about a tokenizer that cannot be translated."""
MARKED = ("CONTROL", "UNKNOWN", "USER_DEFINED")
"""Types of the tokens that llama.cpp finds in a text before it cuts anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One metadata entry, as gguf's writer takes it."""

    key: str
    value: Any
    type: Any
    """gguf.GGUFValueType."""
    sub_type: Any = None
    """Type of an array's items; None for gguf's choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """The `tokenizer.*` entries of a file."""

    entries: tuple[Entry, ...]
    source: Path
    """The file that they come from."""
    notes: tuple[str, ...] = ()
    """What the user should know of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTable:
    """The token of each id, and its gguf.TokenType."""

    tokens: tuple[str, ...]
    types: tuple[int, ...]

    def of_kinds(self, *kinds: str) -> list[str]:
        """List the tokens whose type has one of these names."""
        import gguf

        wanted = {int(gguf.TokenType[kind]) for kind in kinds}
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in wanted]


def token_table(
    vocabulary: Mapping[str, int], added: Mapping[str, Mapping[str, Any]], vocab_size: int, path: Path
) -> TokenTable:
    """List `vocab_size` tokens: the vocabulary's, the added ones over them, and placeholders where an id has none.

    `added` is token -> its entry of tokenizer.json. Raises CheckpointError for more tokens than `vocab_size`.
    """
    import gguf

    by_id = {index: token for token, index in vocabulary.items()} | {t["id"]: name for name, t in added.items()}
    if max(by_id) >= vocab_size:
        raise CheckpointError(
            "the tokenizer has more tokens than the model's embedding has rows",
            where=str(path),
            got=max(by_id) + 1,
            wanted=f"at most {vocab_size}",
            do=ADVICE,
        )
    tokens: list[str] = []
    types: list[int] = []
    for index in range(vocab_size):
        token = by_id.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(int(gguf.TokenType.UNUSED))
            continue
        tokens.append(token)
        kind = gguf.TokenType.NORMAL
        if token in added:
            kind = gguf.TokenType.CONTROL if added[token].get("special") else gguf.TokenType.USER_DEFINED
        types.append(int(kind))
    return TokenTable(tokens=tuple(tokens), types=tuple(types))


def special_entries(directory: Path, vocab_size: int, *, merges: bool) -> Any:
    """Read special tokens, chat template and (where asked for) merges of `directory`, as a gguf.SpecialVocab."""
    import gguf

    with _without_pair_warnings():
        special: Any = gguf.SpecialVocab(directory, load_merges=merges, n_vocab=vocab_size)
    # llama.cpp would fill in what it takes for usual.
    for name in ("bos", "eos"):
        special.add_special_token.setdefault(name, False)
    return special


def entries_of(writer: Any) -> tuple[Entry, ...]:
    """List the `tokenizer.*` entries that a gguf.GGUFWriter holds."""
    return tuple(
        Entry(key=key, value=item.value, type=item.type, sub_type=item.sub_type)
        for key, item in writer.kv_data[0].items()
        if key.startswith("tokenizer.")
    )


@contextmanager
def _without_pair_warnings() -> Generator[None]:
    """Suppress what the gguf package logs of a template for pairs of texts, which a language model never gets."""
    logger = logging.getLogger("gguf.vocab")

    def wanted(record: logging.LogRecord) -> bool:
        return "TemplateProcessing<pair>" not in record.getMessage()

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
