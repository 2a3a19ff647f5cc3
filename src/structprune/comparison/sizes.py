"""What vocabularies of several sizes cost on text that was not counted, beside what the MLP's channels cost there.

Bits per byte are measured on the model itself: with all tokens, with those that stay of each size (the same weights,
read without the other rows, and the text in those tokens), and once with a small share of the MLP's channels gone. The
comparison of prices per parameter is our own; no paper's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from structprune.api import prune
from structprune.architectures.sources.adapter import NO_ADAPTER
from structprune.assess import EvaluationRequest, VocabularyRequest, evaluate_all
from structprune.assess.vocabulary import choose_sizes
from structprune.errors import InputError
from structprune.observer import Observer
from structprune.recipe import Recipe
from structprune.texts import weighted_texts
from structprune.vocabulary.kept import ALL_TOKENS, KeptTokens

# Enough windows for the channels of a small share, by a method that reads the text once.
_METHOD, _WINDOWS = "fasp", 24


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
class Priced:
    """One smaller model."""

    name: str
    parameters: int
    """Parameters that went, of those of the dense model."""
    bits_per_byte: float
    """Mean of the texts."""
    price: float
    """Bits per byte that a million parameters cost, of those that went beyond the next larger vocabulary's."""


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
        found = None
        for place, size in enumerate(self.sizes):
            if size.price > self.channels.price:
                break
            found = place
        return found


def price_sizes(model: str | Path, request: SizesRequest, observer: Observer) -> SizesTable:
    """Measure every size, and the channels. Raises StructPruneError."""
    if not request.measured_on:
        raise InputError("sizes are compared on text that is not counted", wanted="--measure FILE")
    counted, measured = ({text.name for text in weighted_texts(tuple(t))} for t in (request.texts, request.measured_on))
    if both := sorted(counted & measured):
        raise InputError("a text that is counted cannot say what the others lose", got=both[0], wanted="another text")
    lists = choose_sizes(
        model,
        VocabularyRequest(
            size=0, texts=request.texts, drop_reserve=request.drop_reserve, merge_adapter=request.merge_adapter
        ),
        sorted(set(request.sizes), reverse=True),
        observer,
    )

    def bits(of: str | Path, adapter: str, tokens: KeptTokens) -> float:
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
            observer,
        )
        each = [text.bits_per_byte for text in found.texts if text.bits_per_byte is not None]
        if len(each) < len(found.texts):
            raise InputError("a text writes no bytes that could be counted", wanted="another text for --measure")
        return sum(each) / len(each)

    dense = bits(model, request.merge_adapter, ALL_TOKENS)
    before, removed, rows = dense, 0, list[Priced]()
    for kept, parameters in lists:
        after = bits(model, request.merge_adapter, kept)
        price = (after - before) / ((parameters - removed) / 1e6)
        rows.append(Priced(name=f"{len(kept.ids):,} tokens", parameters=parameters, bits_per_byte=after, price=price))
        before, removed = after, parameters
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
        report = prune(model, recipe, Path(folder) / "channels", observer)
        after = bits(Path(folder) / "channels", NO_ADAPTER, ALL_TOKENS)
    gone = report.size.parameters_before - report.size.parameters_after
    name = f"{report.size.removed_share_of_scope:.1%} of the MLP, {_METHOD}"
    channels = Priced(
        name=name, parameters=gone, bits_per_byte=after, price=(after - dense) / (gone / 1e6) if gone else float("inf")
    )
    return SizesTable(dense_bits=dense, sizes=tuple(rows), lists=tuple(kept for kept, _ in lists), channels=channels)
