"""Which tokens of a model are worth a row, by the texts that it is meant for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
from structprune.calibration.context import SourceContext
from structprune.calibration.select import check_texts, load_windows
from structprune.calibration.sources.file import read_text
from structprune.calibration.sources.parts import Share
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, InputError
from structprune.files import read_json, write_text
from structprune.memory import format_bytes
from structprune.observer import Observer, SilentObserver
from structprune.recipe import Recipe, flag_name
from structprune.recipe.tokens import AUTO_TOKENS, WantedTokens
from structprune.texts import WeightedText, shown_texts, weighted_texts
from structprune.vocabulary.choose import MULTIPLE, CountedText, choose_tokens, least_size, mean_shares
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
_LEAST_MEASURED = 4_000
"""Characters that are measured of a text where sizes are compared."""
# Of a built-in text: more than any but C4 has, of which this is 25 MB.
_MANY_WINDOWS, _SHORT_WINDOW = 2**15, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyRequest:
    """Which tokens are to stay."""

    size: int
    texts: Sequence[str]
    """Files or names of built-in texts, with weights behind a colon: `a.txt:2`."""
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
    texts = weighted_texts(tuple(request.texts))
    check_texts(texts)
    source = _Source.open(model, request.merge_adapter)
    counted, samples = _counted(texts, source, observer)
    kept = _chosen(str(model), source, request, counted)
    reserve = {number for token, number in added_tokens(source.tokenizer).items() if is_reserve(token)}
    lengths = _checked(source.tokenizer, kept, [*samples, PROBE_TEXT], source.where)
    return VocabularyChoice(
        kept=kept,
        num_tokens=len(source.numbered),
        num_reserve=len(reserve & set(kept.ids)),
        lengths=tuple(
            TokenLength(text=text.name, num_bytes=num_bytes, before=before, after=after)
            for text, (num_bytes, before, after) in zip(texts, lengths, strict=False)
        ),
    )


def choose_sizes(
    model: str | Path, request: VocabularyRequest, sizes: Sequence[int], observer: Observer
) -> Iterator[tuple[KeptTokens, int]]:
    """Choose the tokens of every size in one count; yields each list, and the parameters that go with the others.

    Raises what `choose_vocabulary` does.
    """
    source = _Source.open(model, request.merge_adapter)
    counted, _ = _counted(weighted_texts(tuple(request.texts)), source, observer)
    for size in sizes:
        kept = _chosen(str(model), source, replace(request, size=size), counted)
        yield kept, (source.num_rows - len(kept.ids)) * source.row_width


@dataclass(frozen=True, slots=True, kw_only=True)
class PossibleSizes:
    """How many tokens may stay, and what goes with the others."""

    least: int
    """The fewest."""
    all_tokens: int
    num_rows: int
    """Of the embedding, which may have more than there are tokens."""
    row_width: int
    """Parameters that go with one row: of the embedding, of a head of its own, of its bias."""

    def parameters(self, size: int) -> int:
        """Count what goes where `size` tokens stay."""
        return (self.num_rows - size) * self.row_width

    def within(self, parameters: int) -> int:
        """Return the most tokens with which at least so many parameters go, or the fewest that are possible."""
        most = min(self.num_rows - -(-parameters // self.row_width), self.all_tokens - 1)
        return max(self.least, most // MULTIPLE * MULTIPLE)


def possible_sizes(model: str | Path, recipe: Recipe) -> PossibleSizes:
    """Find how many tokens may stay. Raises InputError where none can go."""
    source = _Source.open(model, recipe.merge_adapter)
    named = _named(source.reader, source.tokenizer, _request(AUTO_TOKENS, recipe, ()))
    return PossibleSizes(
        least=least_size(source.tokenizer, named, source.where),
        all_tokens=len(source.numbered),
        num_rows=source.num_rows,
        row_width=source.row_width,
    )


def split_texts(
    model: str | Path, recipe: Recipe, folder: Path, observer: Observer
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write the first nine tenths of every text that is counted, and the rest, into files of `folder`.

    Returns the first parts with the texts' weights, and the rests. Raises InputError for a text that is too short.
    """
    source = _Source.open(model, recipe.merge_adapter)
    first, rest = list[str](), list[str]()
    for number, text in enumerate(weighted_texts((*recipe.calibration, *recipe.vocabulary_text))):
        content = _content(text, source, observer)
        place = content.rfind("\n", 0, len(content) * 9 // 10) + 1 or len(content) * 9 // 10
        if len(content) - place < _LEAST_MEASURED:
            raise InputError(
                "a text is too short to say how many tokens are worth a row",
                where=text.name,
                got=f"{len(content):,} characters",
                wanted=f"{10 * _LEAST_MEASURED:,} or more",
                do="name a larger text, or a number of tokens",
            )
        for parts, name, part in ((first, "counted", content[:place]), (rest, "measured", content[place:])):
            path = folder / f"{name}-{number}-{Path(text.name).stem}.txt"
            write_text(path, part)
            parts.append(f"{path}:{text.weight:g}" if name == "counted" else str(path))
    return tuple(first), tuple(rest)


def _counted(texts: Sequence[WeightedText], source: _Source, observer: Observer) -> tuple[list[CountedText], list[str]]:
    """Count every text; returns the starts of them too."""
    observer.start("count tokens", len(texts))
    counted, samples = list[CountedText](), list[str]()
    for text in texts:
        counts_V, sample = _count(text, source, observer)
        counted.append(CountedText(name=text.name, weight=text.weight, counts_V=counts_V))
        samples.append(sample)
        observer.advance(Path(text.name).name)
    return counted, samples


def decided(model: str | Path, recipe: Recipe, observer: Observer) -> Recipe:
    """Choose the tokens that stay where the recipe says only how many; tell the observer what that means for texts.

    Raises what `choose_vocabulary` does.
    """
    if not isinstance(recipe.vocabulary, WantedTokens):
        _check_idle(recipe)
        return recipe
    request = _request(recipe.vocabulary, recipe, (*recipe.calibration, *recipe.vocabulary_text))
    found = choose_vocabulary(model, request, observer)
    kept = found.kept
    observer.note(
        f"{len(kept.ids):,} of {found.num_tokens:,} tokens stay, {kept.covered:.3%} of the {kept.num_tokens:,} that "
        "were counted"
    )
    for each in found.lengths:
        observer.note(f"{each.text} takes {each.after / max(1, each.before) - 1:.2%} more tokens")
    if found.num_reserve:
        observer.note(f"{found.num_reserve:,} added tokens stay that stand for nothing; --drop-reserve lets them go")
    return recipe.with_tokens(kept)


def planned(model: str | Path, recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """Choose as many tokens as a run would, none of them counted; returns what to say of it too.

    Sizes follow from the number alone. Raises InputError for a number that is not possible.
    """
    if not isinstance(recipe.vocabulary, WantedTokens):
        _check_idle(recipe)
        return recipe, ()
    request = _request(recipe.vocabulary, recipe, ())
    source = _Source.open(model, request.merge_adapter)
    kept = _chosen(str(model), source, request, [])
    texts = (*recipe.calibration, *recipe.vocabulary_text)
    files = [path for text in weighted_texts(texts) if (path := text.path) is not None]
    size = format_bytes(sum(min(path.stat().st_size, _MOST_BYTES) for path in files))
    said = (
        f"which {len(kept.ids):,} tokens stay is decided by the run, which counts them first on {shown_texts(texts)}"
        f" ({size} of files)"
    )
    return recipe.with_tokens(kept), (said,)


def _check_idle(recipe: Recipe) -> None:
    """Raise InputError for settings of a choice of tokens where none is to be made."""
    given = [flag_name(name) for name in ("vocabulary_text", "drop_reserve") if getattr(recipe, name)]
    if given:
        raise InputError(
            f"{' and '.join(given)} decides which tokens stay, and no number of them is asked for",
            got="a list of tokens" if recipe.vocabulary else "no --vocabulary",
            wanted="--vocabulary with a number, such as 64000",
        )


def _request(wanted: WantedTokens, recipe: Recipe, texts: tuple[str, ...]) -> VocabularyRequest:
    return VocabularyRequest(
        size=wanted.size, texts=texts, drop_reserve=recipe.drop_reserve, merge_adapter=recipe.merge_adapter
    )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A model's tokenizer, and how many rows there are for its tokens."""

    reader: CheckpointReader
    num_rows: int
    tokenizer: dict[str, Any]
    encoder: TextEncoder
    numbered: dict[int, str]
    """Id -> spelling of the tokens that have a row."""

    @classmethod
    def open(cls, model: str | Path, adapter: str) -> _Source:
        """Read headers and the tokenizer."""
        reader = open_model(str(model), adapter=adapter)
        num_rows, _ = rows_by_token(reader)
        tokenizer = read_tokenizer(reader.directory)
        numbered = all_tokens(tokenizer, str(reader.directory))
        return cls(
            reader=reader,
            num_rows=num_rows,
            tokenizer=tokenizer,
            encoder=TextEncoder(reader.directory, num_rows),
            numbered={number: token for number, token in numbered.items() if number < num_rows},
        )

    @property
    def where(self) -> str:
        return str(self.reader.directory)

    @property
    def row_width(self) -> int:
        """Parameters that go with the row of a token."""
        return row_width(self.reader)

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


def _chosen(model: str, source: _Source, request: VocabularyRequest, counted: Sequence[CountedText]) -> KeptTokens:
    """Choose by counts; without any as the tokenizer's training found tokens common."""
    no_text = CountedText(name="", weight=1.0, counts_V=torch.zeros(source.num_rows, dtype=torch.int64))
    texts = counted or [no_text]
    spelled = source.spelled if counted else {}
    named = _named(source.reader, source.tokenizer, request)
    ids = choose_tokens(source.tokenizer, texts, named, spelled, request.size, source.where)
    return KeptTokens(
        source=model,
        num_rows=source.num_rows,
        tokenizer=identity(source.tokenizer),
        ids=ids,
        texts=tuple(text.name for text in counted),
        num_tokens=sum(int(text.counts_V.sum()) for text in counted),
        covered=min(1.0, float(mean_shares(texts)[torch.tensor(ids)].sum())) if counted else 1.0,
    )


def _count(text: WeightedText, source: _Source, observer: Observer) -> tuple[Tensor, str]:
    """Count the tokens of a text in full, by id; returns the start of the text too."""
    content = _content(text, source, observer)
    return _counts(source, content), content[:_CHECKED_CHARACTERS]


def _content(text: WeightedText, source: _Source, observer: Observer) -> str:
    """Read a text, of a large one pieces from all over it."""
    if text.path is not None:
        return read_text(text.path, source.encoder.render, share=Share(num_bytes=_MOST_BYTES, seed=0))
    found: list[str] = []

    def encode(content: str) -> Tensor:
        found.append(content)
        return source.encoder.encode(content)

    # A built-in text is what its source gives where many windows are asked for.
    context = SourceContext(encode=encode, sample=_no_sample, num_samples=_MANY_WINDOWS, seq_len=_SHORT_WINDOW, seed=0)
    load_windows(text.name, context, observer.note)
    return "\n".join(found)


def _no_sample(num_windows: int, window_len: int, seed: int) -> Tensor:
    raise InputError(
        "text that the model samples itself does not say which tokens are worth a row",
        do="name a text that the model is meant for: --calibration FILE",
    )


def _counts(source: _Source, content: str) -> Tensor:
    counts_V = torch.zeros(source.num_rows, dtype=torch.int64)
    for ids in source.encoder.encoded_pieces(content):
        counts_V += torch.bincount(ids, minlength=source.num_rows)
    return counts_V


def _named(reader: CheckpointReader, tokenizer: dict[str, Any], request: VocabularyRequest) -> set[int]:
    """List the ids that stay because something names them: settings, templates around texts, added tokens."""
    found = set(ids_of(reader.config)) | ids_around_texts(tokenizer)
    settings = reader.directory / "generation_config.json"
    if settings.is_file():
        found |= set(ids_of(read_json(settings)))
    added = added_tokens(tokenizer)
    return found | {number for token, number in added.items() if not (request.drop_reserve and is_reserve(token))}


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
