"""How often texts use each token of a model: all of every text, a part at a time, whatever its size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structprune.architectures.sources.fewer_tokens import read_tokenizer, rows_by_token
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.calibration.context import SourceContext
from structprune.calibration.select import load_windows
from structprune.calibration.sources.file import read_text, text_parts
from structprune.calibration.sources.parts import Share
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import InputError
from structprune.observer import Observer
from structprune.texts import WeightedText
from structprune.vocabulary.choose import CountedText
from structprune.vocabulary.tokenizer_json import all_tokens, identity, with_rows

_CHECKED_CHARACTERS = 200_000
# Progress is told once for so much of a file.
_STEP_BYTES = 16 * 2**20
_SAMPLED_BYTES = 64 * 2**20
# Of a built-in text: more than any but C4 has, of which this is 25 MB.
_MANY_WINDOWS, _SHORT_WINDOW = 2**15, 64


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """A model's tokenizer, and how many rows there are for its tokens."""

    model: str
    """What the model was asked for by."""
    reader: CheckpointReader
    num_rows: int
    row_width: int
    """Parameters that go with the row of a token: of the embedding, of a head of its own, of its bias."""
    tokenizer: dict[str, Any]
    """The tokenizer without tokens that have no row."""
    identity: str
    """SHA-256 of the whole tokenizer."""
    encoder: TextEncoder
    numbered: dict[int, str]
    """Id -> spelling of its tokens."""

    @classmethod
    def open(cls, model: str | Path, adapter: str) -> TokenSource:
        """Read headers and the tokenizer. Raises StructPruneError."""
        reader = open_model(str(model), adapter=adapter)
        num_rows, _ = rows_by_token(reader)
        # First: what the loader takes has the parts that the rest looks for.
        encoder = TextEncoder(reader.directory, num_rows)
        whole, where = read_tokenizer(reader.directory), str(reader.directory)
        tokenizer = with_rows(whole, num_rows, where)
        return cls(
            model=str(model),
            reader=reader,
            num_rows=num_rows,
            row_width=row_width(reader),
            tokenizer=tokenizer,
            identity=identity(whole),
            encoder=encoder,
            numbered=all_tokens(tokenizer, where),
        )

    @property
    def where(self) -> str:
        return str(self.reader.directory)

    @cached_property
    def spelled(self) -> dict[int, str]:
        """What each token writes; bytes of a character that is not whole there write nothing."""
        ids = sorted(self.numbered)
        texts = self.encoder.tokenizer.batch_decode([[number] for number in ids])
        return {number: "" if "\ufffd" in text else text for number, text in zip(ids, texts, strict=True)}


def row_width(reader: CheckpointReader) -> int:
    """Count the parameters that go with the row of a token."""
    _, sliced = rows_by_token(reader)
    return sum(math.prod(reader.shapes[name][1:]) for name in sliced)


def count_texts(
    texts: Sequence[WeightedText], source: TokenSource, observer: Observer
) -> tuple[list[CountedText], list[str]]:
    """Count the tokens of every text; returns the starts of the texts too.

    Raises InputError for a text that cannot be read or has no token, CheckpointError for one that the tokenizer cannot
    encode.
    """
    steps = [_num_steps(text) for text in texts]
    observer.start("count tokens", sum(steps))
    counted, samples = list[CountedText](), list[str]()
    for text, num_steps in zip(texts, steps, strict=True):
        counts_V, sample, done = torch.zeros(source.num_rows, dtype=torch.int64), "", 0
        name, parts = _opened(text, source, observer)
        for part, behind in parts:
            sample += part[: _CHECKED_CHARACTERS - len(sample)]
            for ids in source.encoder.encoded_together(part):
                counts_V += torch.bincount(ids, minlength=source.num_rows)
            while done < min(num_steps - 1, behind // _STEP_BYTES):
                observer.advance(Path(text.name).name)
                done += 1
        for _ in range(done, num_steps):
            observer.advance(Path(text.name).name)
        if not counts_V.any():
            raise InputError("the text has no token that could be counted", where=text.name)
        counted.append(CountedText(name=name, weight=text.weight, counts_V=counts_V))
        samples.append(sample)
    return counted, samples


def sampled_text(text: WeightedText, source: TokenSource, observer: Observer) -> str:
    """Read a text, of a large one pieces from all over it. Raises InputError as `count_texts` does."""
    if text.path is not None:
        return read_text(text.path, source.encoder.render, share=Share(num_bytes=_SAMPLED_BYTES, seed=0))
    return "\n".join(part for part, _ in _opened(text, source, observer)[1])


def _num_steps(text: WeightedText) -> int:
    return 1 if text.path is None else max(1, -(-text.path.stat().st_size // _STEP_BYTES))


def _opened(text: WeightedText, source: TokenSource, observer: Observer) -> tuple[str, Iterable[tuple[str, int]]]:
    """Return what a text is, and its parts, each with how many bytes of its file have been read by then."""
    if text.path is not None:
        return text.name, text_parts(text.path, source.encoder.render)
    found: list[str] = []

    def encode(content: str) -> Tensor:
        found.append(content)
        return source.encoder.encode(content)

    # A built-in text is what its source gives where many windows are asked for.
    context = SourceContext(encode=encode, sample=_no_sample, num_samples=_MANY_WINDOWS, seq_len=_SHORT_WINDOW, seed=0)
    used, _ = load_windows(text.name, context, observer.note)
    return used, [(part, 0) for part in found]


def _no_sample(num_windows: int, window_len: int, seed: int) -> Tensor:
    raise InputError(
        "text that the model samples itself does not say which tokens are worth a row",
        do="name a text that the model is meant for: --calibration FILE",
    )
