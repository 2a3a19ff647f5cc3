"""What vocabularies of several sizes cost on text that was not counted, beside what the MLP's channels cost there.

Bits per byte are measured on the model itself: with all tokens, with those that stay of each size (the same weights,
read without the other rows, and the text in those tokens), and once with a small share of the MLP's channels gone. The
comparison of prices per parameter is our own; no paper's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from structprune.architectures.sources.adapter import NO_ADAPTER
from structprune.assess.counting import TokenSource
from structprune.assess.quality import EvaluationRequest, evaluate_all
from structprune.assess.split import Priced, room_for, tokens_share, why
from structprune.assess.vocabulary import (
    VocabularyRequest,
    choose_sizes,
    possible_sizes,
    split_texts,
    texts_to_count,
)
from structprune.errors import InputError
from structprune.observer import Observer
from structprune.recipe import Recipe
from structprune.recipe.tokens import AUTO_TOKENS, WantedTokens
from structprune.results.report import PruneReport
from structprune.vocabulary.choose import MULTIPLE
from structprune.vocabulary.kept import ALL_TOKENS, KeptTokens

# Enough windows for the channels of a small share, by a method that reads the text once.
_METHOD, _WINDOWS = "fasp", 24
# Sizes that are tried where none is asked for, and what each is measured on.
_STEP, _MOST_SIZES = 0.75, 9
_SEQ_LEN, _MOST_WINDOWS = 1024, 3

Prune = Callable[[str | Path, Recipe, Path, Observer], PruneReport]
"""Prunes a model into a directory: `api.prune`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizesRequest:
    """Which sizes are to be measured, and on what."""

    sizes: Sequence[int]
    texts: Sequence[str]
    """Texts that are counted, and that the channels are calibrated on."""
    measured_on: Sequence[str]
    """Other texts, each counting as much as another."""
    share: float = 0.1
    """Share of the MLP's parameters whose price is measured."""
    seq_len: int = 1024
    max_windows: int = 3
    """Windows of each text."""
    drop_reserve: bool = False
    merge_adapter: str = NO_ADAPTER
    dtype: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class SizesTable:
    """The sizes from the largest on, and what the MLP's channels cost."""

    dense_bits: float
    sizes: tuple[Priced, ...]
    lists: tuple[KeptTokens, ...]
    """The tokens of each size."""
    channels: Priced

    @property
    def best(self) -> int | None:
        """Place of the smallest vocabulary to which no step costs more than channels do; None: not even the first."""
        worth = sum(1 for _ in takewhile(self.channels.costs_no_less_than, self.sizes))
        return worth - 1 if worth else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scales:
    """What a model and smaller ones are weighed on."""

    model: str | Path
    request: SizesRequest
    observer: Observer

    def bits(self, of: str | Path, adapter: str, tokens: KeptTokens) -> float:
        """Measure bits per byte, the mean of the texts."""
        request = self.request
        found = evaluate_all(
            of,
            EvaluationRequest(
                texts=request.measured_on,
                seq_len=request.seq_len,
                max_windows=request.max_windows,
                merge_adapter=adapter,
                tokens=tokens,
                stream=True,
                dtype=request.dtype,
            ),
            self.observer,
        )
        each = [text.bits_per_byte for text in found.texts if text.bits_per_byte is not None]
        if len(each) < len(found.texts):
            raise InputError("a text writes no bytes that could be counted", wanted="another text for --measure")
        return sum(each) / len(each)

    def dense(self) -> float:
        """Measure the model as it is."""
        return self.bits(self.model, self.request.merge_adapter, ALL_TOKENS)

    def sizes(self, dense: float, lists: Iterable[tuple[KeptTokens, int]]) -> Iterator[tuple[KeptTokens, Priced]]:
        """Measure each list, the longest first, beside the one before; the number is that of parameters that go."""
        before, removed = dense, 0
        for kept, parameters in lists:
            after = self.bits(self.model, self.request.merge_adapter, kept)
            price = (after - before) / ((parameters - removed) / 1e6)
            name = f"{len(kept.ids):,} tokens"
            yield kept, Priced(name=name, parameters=parameters, bits_per_byte=after, price=price)
            before, removed = after, parameters

    def channels(self, dense: float, prune: Prune) -> Priced:
        """Measure a model without a share of its channels."""
        request = self.request
        with tempfile.TemporaryDirectory(prefix="structprune-") as folder:
            recipe = Recipe.build(
                method=_METHOD,
                sparsity=request.share,
                calibration=tuple(request.texts),
                merge_adapter=request.merge_adapter,
                num_samples=max(_WINDOWS, len(request.texts)),
                seq_len=request.seq_len,
                held_out=0,
                dtype=request.dtype,
                reload_check=False,
            )
            report = prune(self.model, recipe, Path(folder) / "channels", self.observer)
            after = self.bits(Path(folder) / "channels", NO_ADAPTER, ALL_TOKENS)
        gone = report.size.parameters_before - report.size.parameters_after
        return Priced(
            name=f"{report.size.removed_share_of_scope:.1%} of the MLP, {_METHOD}",
            parameters=gone,
            bits_per_byte=after,
            price=(after - dense) / (gone / 1e6) if gone else float("inf"),
        )


def price_sizes(model: str | Path, request: SizesRequest, observer: Observer, prune: Prune) -> SizesTable:
    """Measure every size, and the channels. Raises StructPruneError."""
    if not request.measured_on:
        raise InputError("sizes are compared on text that is not counted", wanted="--measure FILE")
    counted, measured = ({text.name for text in texts_to_count(t)} for t in (request.texts, request.measured_on))
    if both := sorted(counted & measured):
        raise InputError("a text that is counted cannot say what the others lose", got=both[0], wanted="another text")
    # All of them before anything is measured: one may not be possible.
    source = TokenSource.open(model, request.merge_adapter)
    lists = list(choose_sizes(source, _counted_by(request), sorted(set(request.sizes), reverse=True), observer))
    scales = _Scales(model=model, request=request, observer=observer)
    dense = scales.dense()
    measured_sizes = list(scales.sizes(dense, lists))
    return SizesTable(
        dense_bits=dense,
        sizes=tuple(row for _, row in measured_sizes),
        lists=tuple(kept for kept, _ in measured_sizes),
        channels=scales.channels(dense, prune),
    )


def sized(model: str | Path, recipe: Recipe, observer: Observer, prune: Prune) -> Recipe:
    """Decide how many tokens stay where a recipe leaves that open: down to where more cost more than channels do.

    A limit of parameters is shared out so to tokens and units. Tokens are counted on the first nine tenths of every
    text and measured on the rest; of which ones stay the whole texts decide. The observer hears of every size. Where
    none is worth it all tokens stay. Raises StructPruneError.
    """
    if recipe.vocabulary != AUTO_TOKENS:
        return recipe
    source = TokenSource.open(model, recipe.merge_adapter)
    possible = possible_sizes(source, recipe)
    room = room_for(model, recipe, possible)
    with tempfile.TemporaryDirectory(prefix="structprune-") as folder:
        counted, measured = split_texts(source, recipe, Path(folder), observer)
        request = SizesRequest(
            sizes=ladder(possible.least, possible.all_tokens),
            texts=counted,
            measured_on=measured,
            seq_len=min(recipe.seq_len, _SEQ_LEN),
            max_windows=_MOST_WINDOWS,
            drop_reserve=recipe.drop_reserve,
            merge_adapter=recipe.merge_adapter,
            dtype=recipe.dtype,
        )
        scales = _Scales(model=model, request=request, observer=observer)
        lists = choose_sizes(source, _counted_by(request), request.sizes, observer)
        dense = scales.dense()
        channels = scales.channels(dense, prune)
        observer.note(f"size of the vocabulary: {dense:.4f} bits per byte with all tokens; {channels.line}")
        rows = list[Priced]()
        for _, row in scales.sizes(dense, lists):
            observer.note(f"size of the vocabulary: {row.line}")
            rows.append(row)
            if not channels.costs_no_less_than(row) or row.parameters >= room.most:
                break
    # Below the smallest size that was measured nothing says what tokens cost.
    room = replace(room, most=max(room.least, min(room.most, rows[-1].parameters)))
    gone = tokens_share(rows, [channels], room)
    of = "" if room.limit is None else f" of the {room.limit:,} that have to go"
    if gone:
        stay = possible.within(gone)
        observer.note(
            f"{stay:,} tokens stay; {possible.parameters(stay):,} parameters go with the others{of}: {why(gone, room)}"
        )
        return recipe.model_copy(update={"vocabulary": WantedTokens(size=stay)})
    if recipe.scope == "vocabulary":
        raise InputError(
            "no token is worth to go: the first ones cost more than the MLP's channels do",
            got="--vocabulary auto --scope vocabulary",
            wanted="another scope, or a number of tokens",
        )
    observer.note(f"all tokens stay: {why(gone, room)}")
    return recipe.with_tokens(ALL_TOKENS)


def ladder(least: int, most: int) -> list[int]:
    """List sizes that are tried, each three quarters of the one before, the largest first."""
    sizes = [round(most * _STEP**number) // MULTIPLE * MULTIPLE for number in range(1, _MOST_SIZES + 1)]
    return [size for size in dict.fromkeys(sizes) if size >= least] or [least]


def _counted_by(request: SizesRequest) -> VocabularyRequest:
    return VocabularyRequest(
        size=0, texts=request.texts, drop_reserve=request.drop_reserve, merge_adapter=request.merge_adapter
    )
