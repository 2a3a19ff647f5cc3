"""tokenizer.json with fewer tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from structprune.errors import CheckpointError
from structprune.vocabulary.ids import Ids
from structprune.vocabulary.model import token_model

_FOR_THE_FUTURE = ("<unused", "[unused", "<|reserved_special_token_", "<reserved", "<extra_token_", "<|extra_")


def identity(tokenizer: Mapping[str, Any]) -> str:
    """Hash a tokenizer's content with SHA-256, whatever its file's spaces are."""
    return hashlib.sha256(json.dumps(tokenizer, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def added_tokens(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens that are matched before anything is cut, spelling -> id."""
    return {str(entry["content"]): int(entry["id"]) for entry in tokenizer.get("added_tokens") or ()}


def is_reserve(token: str) -> bool:
    """Whether a token was put there for later uses, and stands for nothing yet."""
    return token.startswith(_FOR_THE_FUTURE)


def all_tokens(tokenizer: Mapping[str, Any], where: str) -> dict[int, str]:
    """Return id -> spelling of all tokens, added ones too. Raises UnsupportedError for an unknown kind."""
    model = tokenizer["model"]
    tokens = token_model(model, where).tokens(model) | added_tokens(tokenizer)
    return {number: token for token, number in tokens.items()}


def needed_ids(tokenizer: Mapping[str, Any], where: str) -> set[int]:
    """Return the tokens without which some text could not be encoded. Raises UnsupportedError for an unknown kind."""
    model = tokenizer["model"]
    kind = token_model(model, where)
    ids = kind.tokens(model)
    return {ids[token] for token in kind.needed(model)}


def with_rows(tokenizer: Mapping[str, Any], num_rows: int, where: str) -> dict[str, Any]:
    """Return the tokenizer without tokens that the embedding has no row for, which no text may have.

    Raises what `shrunk` does.
    """
    if all(number < num_rows for number in all_tokens(tokenizer, where)):
        return dict(tokenizer)
    return shrunk(tokenizer, {number: number for number in range(num_rows)}, where)


def shrunk(tokenizer: Mapping[str, Any], new: Ids, where: str) -> dict[str, Any]:
    """Return the tokenizer with the tokens of `new` alone, under their new ids.

    Raises CheckpointError if what it puts around a text is gone, UnsupportedError for a kind that is not known.
    """
    model = tokenizer["model"]
    kind = token_model(model, where)
    by_id = sorted((number, token) for token, number in kind.tokens(model).items() if number in new)
    result = dict(tokenizer)
    result["model"] = kind.shrink(model, {token: new[number] for number, token in by_id})
    result["added_tokens"] = [
        {**entry, "id": new[entry["id"]]} for entry in tokenizer.get("added_tokens") or () if entry["id"] in new
    ]
    if tokenizer.get("post_processor") is not None:
        result["post_processor"] = _around_texts(tokenizer["post_processor"], new, where)
    if isinstance(padding := tokenizer.get("padding"), Mapping) and "pad_id" in padding:
        result["padding"] = {**padding, "pad_id": _needed(padding["pad_id"], new, where)}
    return result


def _around_texts(processor: Any, new: Ids, where: str) -> Any:
    """Renumber what is put around a text: templates, and the pairs of BERT and RoBERTa."""
    if not isinstance(processor, Mapping):
        return processor
    result = dict(processor)
    if isinstance(processors := processor.get("processors"), Sequence):
        result["processors"] = [_around_texts(inner, new, where) for inner in processors]
    if isinstance(special := processor.get("special_tokens"), Mapping):
        result["special_tokens"] = {
            name: {**entry, "ids": [_needed(number, new, where) for number in entry["ids"]]}
            for name, entry in special.items()
        }
    for name in ("sep", "cls"):
        if isinstance(pair := processor.get(name), Sequence) and len(pair) == 2:
            result[name] = [pair[0], _needed(pair[1], new, where)]
    return result


def _needed(number: int, new: Ids, where: str) -> int:
    if number not in new:
        raise CheckpointError(
            "a token that the tokenizer puts around texts is not among those that stay", where=where, got=str(number)
        )
    return new[number]


def ids_around_texts(tokenizer: Mapping[str, Any]) -> set[int]:
    """List the ids that the tokenizer itself puts around texts or fills them up with."""
    found: set[int] = set()

    def collect(value: Any) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                if name == "ids" and isinstance(inner, list):
                    found.update(inner)
                elif name in ("sep", "cls") and isinstance(inner, list) and len(inner) == 2:
                    found.add(inner[1])
                elif name == "pad_id" and isinstance(inner, int):
                    found.add(inner)
                else:
                    collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)

    collect({name: tokenizer.get(name) for name in ("post_processor", "padding")})
    return found
