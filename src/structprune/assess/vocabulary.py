"""Which tokens of a model are worth a row, by the texts that it is meant for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from structprune.architectures.sources.adapter import NO_ADAPTER
from structprune.architectures.sources.same_tokens import PROBE_TEXT
from structprune.assess.counting import TokenSource, count_texts, sampled_text
from structprune.calibration.select import check_texts
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, InputError
from structprune.files import read_json, write_text
from structprune.memory import format_bytes
from structprune.observer import Observer, SilentObserver
from structprune.recipe import Recipe, flag_name
from structprune.recipe.tokens import AUTO_TOKENS, WantedTokens
from structprune.texts import WeightedText, shown_texts, weighted_texts
from structprune.vocabulary.choose import (
    MULTIPLE,
    CountedText,
    choose_tokens,
    least_size,
    mean_shares,
    possible_size,
)
from structprune.vocabulary.ids import ids_of
from structprune.vocabulary.kept import KeptTokens
from structprune.vocabulary.tokenizer_json import (
    added_tokens,
    ids_around_texts,
    is_reserve,
    shrunk,
)

_LEAST_MEASURED = 4_000
"""Characters that are measured of a text where sizes are compared."""


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


def texts_to_count(asked: Sequence[str]) -> tuple[WeightedText, ...]:
    """Split the texts from their weights. Raises InputError for a weight that is none, and a text named twice."""
    try:
        return weighted_texts(tuple(asked))
    except ValueError as error:
        raise InputError(f"the texts cannot be counted: {error}") from None


def choose_vocabulary(
    model: str | Path, request: VocabularyRequest, observer: Observer | None = None
) -> VocabularyChoice:
    """Choose the tokens of `model` that stay, and check that texts of kept tokens are encoded as before.

    Raises StructPruneError.
    """
    observer = observer or SilentObserver()
    if not request.texts:
        raise InputError("no text is named", wanted="--text FILE, such as the model is meant to read and write")
    texts = texts_to_count(request.texts)
    check_texts(texts)
    source = TokenSource.open(model, request.merge_adapter)
    _check_sizes(source, request, [request.size])
    counted, samples = count_texts(texts, source, observer)
    kept = _chosen(source, request, counted)
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
    source: TokenSource, request: VocabularyRequest, sizes: Sequence[int], observer: Observer
) -> Iterator[tuple[KeptTokens, int]]:
    """Choose the tokens of every size in one count; yields each list, and the parameters that go with the others.

    Raises what `choose_vocabulary` does.
    """
    _check_sizes(source, request, sizes)
    counted, _ = count_texts(texts_to_count(request.texts), source, observer)
    for size in sizes:
        kept = _chosen(source, replace(request, size=size), counted)
        yield kept, (source.num_rows - len(kept.ids)) * source.row_width


@dataclass(frozen=True, slots=True, kw_only=True)
class PossibleSizes:
    """How many tokens may stay, and what goes with the others."""

    least: int
    """The fewest."""
    all_tokens: int
    num_rows: int
    """Rows of the embedding, which may have more than there are tokens."""
    row_width: int
    """Parameters that go with one row: of the embedding, of a head of its own, of its bias."""

    def parameters(self, size: int) -> int:
        """Count what goes where `size` tokens stay."""
        return (self.num_rows - size) * self.row_width

    def within(self, parameters: int) -> int:
        """Return the most tokens with which at least so many parameters go, or the fewest that are possible."""
        most = min(self.num_rows - -(-parameters // self.row_width), self.all_tokens - 1)
        return max(self.least, most // MULTIPLE * MULTIPLE)


def possible_sizes(source: TokenSource, recipe: Recipe) -> PossibleSizes:
    """Find how many tokens may stay. Raises InputError where none can go."""
    named = _named(source.reader, source.tokenizer, _request(AUTO_TOKENS, recipe, ()))
    return PossibleSizes(
        least=least_size(source.tokenizer, named, source.where),
        all_tokens=len(source.numbered),
        num_rows=source.num_rows,
        row_width=source.row_width,
    )


def split_texts(
    source: TokenSource, recipe: Recipe, folder: Path, observer: Observer
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write the first nine tenths of every text that is counted, and the rest, into files of `folder`.

    Returns the first parts with the texts' weights, and the rests. Raises InputError for a text that is too short.
    """
    first, rest = list[str](), list[str]()
    for number, text in enumerate(texts_to_count((*recipe.calibration, *recipe.vocabulary_text))):
        content = sampled_text(text, source, observer)
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
    source = TokenSource.open(model, request.merge_adapter)
    kept = _chosen(source, request, [])
    texts = (*recipe.calibration, *recipe.vocabulary_text)
    files = [path for text in texts_to_count(texts) if (path := text.path) is not None]
    size = format_bytes(sum(path.stat().st_size for path in files))
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


def _check_sizes(source: TokenSource, request: VocabularyRequest, sizes: Sequence[int]) -> None:
    """Raise InputError for a size that is not possible, before texts are counted."""
    named = _named(source.reader, source.tokenizer, request)
    for size in sizes:
        possible_size(source.tokenizer, named, size, source.where)


def _chosen(source: TokenSource, request: VocabularyRequest, counted: Sequence[CountedText]) -> KeptTokens:
    """Choose by counts; without any as the tokenizer's training found tokens common."""
    no_text = CountedText(name="", weight=1.0, counts_V=torch.zeros(source.num_rows, dtype=torch.int64))
    texts = counted or [no_text]
    spelled = source.spelled if counted else {}
    named = _named(source.reader, source.tokenizer, request)
    ids = choose_tokens(source.tokenizer, texts, named, spelled, request.size, source.where)
    return KeptTokens(
        source=source.model,
        num_rows=source.num_rows,
        tokenizer=source.identity,
        ids=ids,
        texts=tuple(text.name for text in counted),
        num_tokens=sum(int(text.counts_V.sum()) for text in counted),
        covered=min(1.0, float(mean_shares(texts)[torch.tensor(ids)].sum())) if counted else 1.0,
    )


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
