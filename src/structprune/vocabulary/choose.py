"""Which tokens are worth a row: those that texts use, and those that the tokenizer's training found common.

Every text's counts are shares of its own tokens, so that a long text does not decide alone. Texts that are counted are
a sample: a tenth of the decision is left to the order in which training made the tokens, as a power law, for tokens
whose scripts occur in the texts. So a token that is common elsewhere stays before one that stands in the texts once.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from structprune.errors import InputError
from structprune.vocabulary.model import token_model
from structprune.vocabulary.tokenizer_json import all_tokens, needed_ids

MULTIPLE = 64
"""Rows of the result are a multiple of this."""
# Of all letters of the texts: scripts that are rarer are taken for stray names.
_LEAST_SHARE = 1e-4
# What is left to the order of training; and the place in it up to which tokens count nearly alike. With it texts of P2
# that were not counted get 3.2% longer in tokens at a fifth of Gemma 3's vocabulary, by counts alone 3.4%.
_TRAINED_SHARE, _TRAINED_FLAT = 0.1, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedText:
    """How often a text uses each token."""

    name: str
    weight: float
    counts_V: Tensor
    """Number of times, by id; int64."""


def choose_tokens(
    tokenizer: Mapping[str, Any],
    texts: Sequence[CountedText],
    needed: Collection[int],
    spelled: Mapping[int, str],
    size: int,
    where: str,
) -> tuple[int, ...]:
    """Return the ids of `size` tokens, rounded down to a multiple, ascending.

    `needed` are ids that stay whatever their counts, beside those without which texts could not be encoded; `spelled`
    is the text that each id stands for, where it is whole characters. Raises InputError for a size that holds less
    than what must stay, or is no reduction.
    """
    model = tokenizer["model"]
    kind = token_model(model, where)
    ids, closure = kind.tokens(model), kind.closure(model)
    numbered = all_tokens(tokenizer, where)
    kept = _staying(tokenizer, needed, where)
    wanted = possible_size(tokenizer, needed, size, where)
    for number in _in_order(kind.most_likely_first(model), ids, texts, spelled):
        if len(kept) == wanted:
            break
        if number in kept or number not in numbered:
            continue
        new = {number, *(ids[part] for part in closure(numbered[number]))} - kept
        if len(kept) + len(new) <= wanted:
            kept |= new
    return tuple(sorted(kept))


def possible_size(tokenizer: Mapping[str, Any], needed: Collection[int], size: int, where: str) -> int:
    """Return `size`, rounded down to a multiple. Raises InputError as `choose_tokens` does."""
    wanted, least = size // MULTIPLE * MULTIPLE, least_size(tokenizer, needed, where)
    num_tokens = len(all_tokens(tokenizer, where))
    if not least <= wanted < num_tokens:
        raise InputError(
            "the vocabulary cannot have this size",
            where=where,
            got=f"{size:,} tokens",
            wanted=f"at least {least:,}, for what every text needs and what is named elsewhere, and fewer than "
            f"{num_tokens:,}",
        )
    return wanted


def least_size(tokenizer: Mapping[str, Any], needed: Collection[int], where: str) -> int:
    """Return the fewest tokens that may stay, by `needed` as in `choose_tokens`. Raises InputError if none can go."""
    num_kept, num_tokens = len(_staying(tokenizer, needed, where)), len(all_tokens(tokenizer, where))
    least = num_kept // MULTIPLE * MULTIPLE + MULTIPLE
    if least >= num_tokens:
        raise InputError(
            "no token of this vocabulary can go",
            where=where,
            got=f"{num_tokens:,} tokens, of which {num_kept:,} are needed by every text or named elsewhere",
            do="prune the model without --vocabulary",
        )
    return least


def _staying(tokenizer: Mapping[str, Any], needed: Collection[int], where: str) -> set[int]:
    """Return the ids that stay whatever the texts."""
    numbered = all_tokens(tokenizer, where)
    return {number for number in needed if number in numbered} | needed_ids(tokenizer, where)


def _in_order(
    common: Sequence[str], ids: Mapping[str, int], texts: Sequence[CountedText], spelled: Mapping[int, str]
) -> Iterable[int]:
    """Yield ids, the most useful first; those of other scripts last, as training found them common."""
    share_V = mean_shares(texts)
    used = torch.nonzero(share_V).flatten().tolist()
    scripts = _scripts_of(used, share_V, spelled)
    trained = [ids[token] for token in common]
    likely_V = torch.zeros_like(share_V)
    for place, number in enumerate(trained):
        if script_set(spelled.get(number, "")) <= scripts:
            likely_V[number] = 1 / (_TRAINED_FLAT + place)
    score_V = share_V + _TRAINED_SHARE * likely_V / likely_V.sum().clamp_min(1e-300)
    order = torch.argsort(score_V, descending=True, stable=True)
    yield from order[score_V[order] > 0].tolist()
    yield from trained


def mean_shares(texts: Sequence[CountedText]) -> Tensor:
    """Return the share that each token has of the texts, weighted, float64."""
    total = sum(text.weight for text in texts)
    shares = [text.weight / total * text.counts_V.double() / max(1, int(text.counts_V.sum())) for text in texts]
    return torch.stack(shares).sum(dim=0)


def _scripts_of(used: Iterable[int], share_V: Tensor, spelled: Mapping[int, str]) -> set[str]:
    found: dict[str, float] = {}
    for number in used:
        for script in script_set(spelled.get(number, "")):
            found[script] = found.get(script, 0.0) + float(share_V[number])
    total = sum(found.values())
    return {script for script, share in found.items() if share >= _LEAST_SHARE * total}


@cache
def _script(character: str) -> str:
    """Return the first word of a letter's name, which is its script: LATIN, CYRILLIC, CJK."""
    return unicodedata.name(character, "").partition(" ")[0] if character.isalpha() else ""


def script_set(text: str) -> set[str]:
    """Return the scripts of a text's letters."""
    return {script for character in text if (script := _script(character))}
