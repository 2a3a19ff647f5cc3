"""What each kind of tokenizer needs to stay whole, and how it is written with fewer tokens.

All work on the entry `model` of a tokenizer.json. A text whose tokens all stay is encoded as before, because

- BPE applies the merge of lowest rank first: if every token that came about on the way to one that stays does too, the
  smaller table has the same lowest merge at every step;
- Unigram takes the likeliest of all ways to cut a text, and WordPiece the longest piece: fewer candidates, and the one
  that was taken is still among them.

Tokens that encode what nothing else does (bytes, single characters, the unknown token) stay, so that every text that
could be encoded still can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from structprune.errors import CheckpointError, UnsupportedError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MANY_BYTES = 256
Model = Mapping[str, Any]
Closure = Callable[[str], Collection[str]]
"""Token -> the tokens without which it does not come about; itself is not among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenModel:
    """One kind of tokenizer, as data."""

    tokens: Callable[[Model], dict[str, int]]
    """Spelling -> id."""
    needed: Callable[[Model], set[str]]
    """Tokens without which some text could not be encoded any more."""
    closure: Callable[[Model], Closure]
    shrink: Callable[[Model, Mapping[str, int]], dict[str, Any]]
    """The model with these tokens alone, spelling -> new id, ascending."""
    most_likely_first: Callable[[Model], list[str]]
    """The tokens in the order in which the tokenizer's own training took them for common."""


def token_model(model: Model, where: str) -> TokenModel:
    """Return the kind of a tokenizer. Raises UnsupportedError for one that is not known."""
    kind = str(model.get("type"))
    if kind not in TOKEN_MODELS:
        raise UnsupportedError(
            "tokens of this kind of tokenizer cannot be taken out",
            where=where,
            got=f"a {kind} model"[:80],
            wanted=", ".join(TOKEN_MODELS),
        )
    return TOKEN_MODELS[kind]


def _listed(model: Model) -> dict[str, int]:
    """Return the entry `vocab` of BPE and WordPiece. Raises CheckpointError where it is no list of tokens."""
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not all(isinstance(token, int) for token in vocabulary.values()):
        raise CheckpointError("tokenizer.json has no usable vocabulary", got=str(type(vocabulary).__name__))
    return vocabulary


def _unknown(model: Model) -> set[str]:
    return {token} if isinstance(token := model.get("unk_token"), str) and token in _listed(model) else set()


# Byte-pair encoding


def _merges(model: Model) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for merge in model.get("merges") or ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            raise CheckpointError("a merge of tokenizer.json is no pair", got=repr(merge)[:80])
        pairs.append((pair[0], pair[1]))
    return pairs


def _merged(model: Model, first: str, second: str) -> str:
    """Return what a merge makes: a mark of pieces that continue a word is left out of the second one."""
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _bpe_needed(model: Model) -> set[str]:
    vocabulary = _listed(model)
    single = {token for token in vocabulary if len(_stripped(model, token)) == 1}
    found = {token for token in vocabulary if _BYTE.fullmatch(token)} if model.get("byte_fallback") else set[str]()
    # Bytes stand for every character, but for a tokenizer that lacks some of them.
    return _unknown(model) | (found if len(found) == _MANY_BYTES else found | single)


def _stripped(model: Model, token: str) -> str:
    """Return the characters that a token stands for."""
    return token.removeprefix(model.get("continuing_subword_prefix") or "").removesuffix(
        model.get("end_of_word_suffix") or ""
    )


def _bpe_closure(model: Model) -> Closure:
    vocabulary = _listed(model)
    ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""

    def parts(token: str) -> set[str]:
        """Merge the characters of the token as a text, and collect what comes about on the way."""
        text = token.removeprefix(prefix).removesuffix(suffix)
        pieces = [(prefix if number or token.startswith(prefix) else "") + char for number, char in enumerate(text)]
        if suffix and pieces and token.endswith(suffix):
            pieces[-1] += suffix
        found = set(pieces)
        while len(pieces) > 1:
            best = min(
                range(len(pieces) - 1), key=lambda at: ranks.get((pieces[at], pieces[at + 1]), len(ranks)), default=0
            )
            if (pieces[best], pieces[best + 1]) not in ranks:
                # Not made by merges: taken as a whole word, or never.
                return set()
            pieces[best : best + 2] = [_merged(model, pieces[best], pieces[best + 1])]
            found.add(pieces[best])
        # Characters that stand for bytes elsewhere are no tokens.
        return {piece for piece in found if piece in vocabulary and piece != token}

    return parts


def _bpe_shrunk(model: Model, ids: Mapping[str, int]) -> dict[str, Any]:
    kept = ids.keys()
    merges = [list(pair) for pair in _merges(model) if {*pair} <= kept and _merged(model, *pair) in kept]
    return {**model, "vocab": dict(ids), "merges": merges}


def _by_merges(model: Model) -> list[str]:
    """Order tokens by the first merge that makes them: training made the commonest pairs first."""
    order = dict.fromkeys(_merged(model, *pair) for pair in _merges(model))
    return [token for token in order if token in _listed(model)]


# Unigram


def _pieces(model: Model) -> list[tuple[str, float]]:
    pieces = model.get("vocab")
    if not isinstance(pieces, list):
        raise CheckpointError("tokenizer.json has no usable vocabulary", got=str(type(pieces).__name__))
    return [(str(piece), float(score)) for piece, score in pieces]


def _unigram_needed(model: Model) -> set[str]:
    pieces = [piece for piece, _ in _pieces(model)]
    unknown = model.get("unk_id")
    found = {pieces[unknown]} if isinstance(unknown, int) and 0 <= unknown < len(pieces) else set[str]()
    if model.get("byte_fallback"):
        byte_pieces = {piece for piece in pieces if _BYTE.fullmatch(piece)}
        if len(byte_pieces) == _MANY_BYTES:
            return found | byte_pieces
    return found | {piece for piece in pieces if len(piece) == 1}


def _unigram_shrunk(model: Model, ids: Mapping[str, int]) -> dict[str, Any]:
    if list(ids.values()) != list(range(len(ids))):
        raise UnsupportedError(
            "added tokens stand between the pieces of this tokenizer, which are counted by their places",
            wanted="pieces first, added tokens behind them",
        )
    scores = dict(_pieces(model))
    result = {**model, "vocab": [[token, scores[token]] for token in ids]}
    unknown = model.get("unk_id")
    if isinstance(unknown, int):
        result["unk_id"] = ids[_pieces(model)[unknown][0]]
    return result


def _by_score(model: Model) -> list[str]:
    return [piece for piece, _ in sorted(_pieces(model), key=lambda pair: -pair[1])]


# WordPiece


def _wordpiece_needed(model: Model) -> set[str]:
    prefix = model.get("continuing_subword_prefix") or "##"
    return _unknown(model) | {token for token in _listed(model) if len(token.removeprefix(prefix)) == 1}


def _without_parts(model: Model) -> Closure:
    return lambda token: ()


TOKEN_MODELS: Mapping[str, TokenModel] = {
    "BPE": TokenModel(
        tokens=_listed,
        needed=_bpe_needed,
        closure=_bpe_closure,
        shrink=_bpe_shrunk,
        most_likely_first=_by_merges,
    ),
    "Unigram": TokenModel(
        tokens=lambda model: {piece: number for number, (piece, _) in enumerate(_pieces(model))},
        needed=_unigram_needed,
        closure=_without_parts,
        shrink=_unigram_shrunk,
        most_likely_first=_by_score,
    ),
    "WordPiece": TokenModel(
        tokens=_listed,
        needed=_wordpiece_needed,
        closure=_without_parts,
        shrink=lambda model, ids: {**model, "vocab": dict(ids)},
        # Vocabularies of WordPiece list the commonest words first.
        most_likely_first=lambda model: list(_listed(model)),
    ),
}
"""Entry `type` of the model -> kind."""


def closed(tokens: Iterable[str], closure: Closure) -> set[str]:
    """Add everything without which the tokens do not come about."""
    found = set(tokens)
    for token in tuple(found):
        found |= set(closure(token))
    return found
