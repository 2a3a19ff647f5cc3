"""Which tokens of a model are worth a row, by the texts that it is meant for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from structprune.architectures.sources.adapter import NO_ADAPTER
from structprune.architectures.sources.fewer_tokens import read_tokenizer, rows_by_token
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.sources.same_tokens import PROBE_TEXT
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.calibration.sources.file import read_text
from structprune.calibration.sources.parts import Share
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, InputError
from structprune.files import read_json
from structprune.observer import Observer, SilentObserver
from structprune.texts import WeightedText, weighted_texts
from structprune.vocabulary.choose import CountedText, choose_tokens, mean_shares
from structprune.vocabulary.ids import ids_of
from structprune.vocabulary.kept import KeptTokens
from structprune.vocabulary.tokenizer_json import (
    added_tokens,
    all_tokens,
    identity,
    ids_around_texts,
    is_reserve,
    shrunk,
)

_MOST_BYTES = 64 * 2**20
"""Bytes that are counted of a larger text, from places all over it."""
_CHECKED_CHARACTERS = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyRequest:
    """Which tokens are to stay."""

    size: int
    texts: Sequence[str]
    """Files, with weights behind a colon: `a.txt:2`."""
    drop_reserve: bool = False
    """Whether added tokens that stand for nothing yet (`<unused12>`) may go as others do."""
    merge_adapter: str = NO_ADAPTER


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLength:
    """How much longer a text gets."""

    text: str
    num_bytes: int
    before: int
    """Tokens of the start of the text."""
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyChoice:
    """The tokens that stay, and what that means for the texts."""

    kept: KeptTokens
    num_tokens: int
    """Tokens of the source's tokenizer."""
    num_reserve: int
    """Added tokens that stand for nothing yet, of those that stay."""
    lengths: tuple[TokenLength, ...]


def choose_vocabulary(
    model: str | Path, request: VocabularyRequest, observer: Observer | None = None
) -> VocabularyChoice:
    """Choose the tokens of `model` that stay, and check that texts of kept tokens are encoded as before.

    Raises StructPruneError.
    """
    observer = observer or SilentObserver()
    if not request.texts:
        raise InputError("no text is named", wanted="--text FILE, such as the model is meant to read and write")
    reader = open_model(str(model), adapter=request.merge_adapter)
    num_rows, _ = rows_by_token(reader)
    tokenizer = read_tokenizer(reader.directory)
    where = str(reader.directory)
    encoder = TextEncoder(reader.directory, num_rows)
    texts = weighted_texts(tuple(request.texts))
    observer.start("count tokens", len(texts))
    counted, samples = list[CountedText](), list[str]()
    for text in texts:
        content = _read(text, encoder)
        counted.append(CountedText(name=text.name, weight=text.weight, counts_V=_counts(encoder, content, num_rows)))
        samples.append(content[:_CHECKED_CHARACTERS])
        observer.advance(text.name)
    numbered = {number: token for number, token in all_tokens(tokenizer, where).items() if number < num_rows}
    ids = choose_tokens(
        tokenizer, counted, _named(reader, tokenizer, request), _spelled(encoder, numbered), request.size, where
    )
    share_V = mean_shares(counted)
    kept = KeptTokens(
        source=str(model),
        num_rows=num_rows,
        tokenizer=identity(tokenizer),
        ids=ids,
        texts=tuple(text.name for text in texts),
        num_tokens=sum(int(text.counts_V.sum()) for text in counted),
        covered=min(1.0, float(share_V[torch.tensor(ids)].sum())),
    )
    reserve = {number for token, number in added_tokens(tokenizer).items() if is_reserve(token)}
    lengths = _checked(tokenizer, kept, [*samples, PROBE_TEXT], where)
    return VocabularyChoice(
        kept=kept,
        num_tokens=len(numbered),
        num_reserve=len(reserve & set(ids)),
        lengths=tuple(
            TokenLength(text=text.name, num_bytes=num_bytes, before=before, after=after)
            for text, (num_bytes, before, after) in zip(texts, lengths, strict=False)
        ),
    )


def _read(text: WeightedText, encoder: TextEncoder) -> str:
    if text.path is None:
        raise InputError("tokens are counted on files", got=text.name, wanted="--text FILE")
    return read_text(text.path, encoder.render, share=Share(num_bytes=_MOST_BYTES, seed=0))


def _counts(encoder: TextEncoder, content: str, num_rows: int) -> Tensor:
    return torch.bincount(encoder.encode(content), minlength=num_rows)


def _named(reader: CheckpointReader, tokenizer: dict[str, Any], request: VocabularyRequest) -> set[int]:
    """List the ids that stay because something names them: settings, templates around texts, added tokens."""
    found = set(ids_of(reader.config)) | ids_around_texts(tokenizer)
    settings = reader.directory / "generation_config.json"
    if settings.is_file():
        found |= set(ids_of(read_json(settings)))
    added = added_tokens(tokenizer)
    return found | {number for token, number in added.items() if not (request.drop_reserve and is_reserve(token))}


def _spelled(encoder: TextEncoder, numbered: dict[int, str]) -> dict[int, str]:
    """Return what each token writes; bytes of a character that is not whole there write nothing."""
    ids = sorted(numbered)
    texts = encoder.tokenizer.batch_decode([[number] for number in ids])
    return {number: "" if "\ufffd" in text else text for number, text in zip(ids, texts, strict=True)}


def _checked(
    tokenizer: dict[str, Any], kept: KeptTokens, samples: Sequence[str], where: str
) -> list[tuple[int, int, int]]:
    """Encode samples with all tokens and with those that stay; returns (bytes, tokens before, tokens after) of each.

    Raises CheckpointError if a line whose tokens all stay is encoded otherwise, or one is decoded otherwise.
    """
    before, after = (
        Tokenizer.from_str(json.dumps(each)) for each in (tokenizer, shrunk(tokenizer, kept.new_ids, where))
    )
    new, found = kept.new_ids, list[tuple[int, int, int]]()
    for sample in samples:
        num_bytes = num_before = num_after = 0
        for line in sample.splitlines(keepends=True):
            old, now = before.encode(line, add_special_tokens=False), after.encode(line, add_special_tokens=False)
            same = [new.get(number) for number in old.ids] == now.ids
            whole = before.decode(old.ids, skip_special_tokens=False) == after.decode(
                now.ids, skip_special_tokens=False
            )
            if not whole or (not same and all(number in new for number in old.ids)):
                raise CheckpointError(
                    "with fewer tokens the tokenizer reads a text otherwise",
                    where=where,
                    got=f"{now.tokens[:12]} of {line[:40]!r}",
                    wanted=f"{old.tokens[:12]}",
                    do="report this, with the tokenizer's name",
                )
            num_bytes += len(line.encode())
            num_before += len(old.ids)
            num_after += len(now.ids)
        found.append((num_bytes, num_before, num_after))
    return found
