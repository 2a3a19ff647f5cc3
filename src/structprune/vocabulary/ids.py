"""Ids of tokens in the files around a model: configs, generation settings, the tokenizer's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from structprune.errors import CheckpointError

_ONE = re.compile(r"(.*_)?token_(id|index)")
_SEVERAL = re.compile(r"(.*_)?tokens?_ids?|(begin_)?suppress_tokens")
_LISTS = ("bad_words_ids", "force_words_ids")
_PAIRS = ("forced_decoder_ids",)
_NO_TOKEN = -1
Ids = Mapping[int, int]
"""Id in the source -> id in the result."""


def ids_of(config: Any) -> Iterator[int]:
    """Yield the ids of single tokens that a config names, at any depth."""
    if not isinstance(config, Mapping):
        return
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from ids_of(value)
        elif _ONE.fullmatch(str(name)):
            yield from (number for number in (value if isinstance(value, list) else [value]) if _is_id(number))
        elif name in _PAIRS and isinstance(value, list):
            yield from (pair[1] for pair in value if isinstance(pair, list) and len(pair) == 2 and _is_id(pair[1]))


def with_new_ids(config: Mapping[str, Any], new: Ids, num_rows: int, where: str) -> dict[str, Any]:
    """Rewrite a config or generation settings: ids, and entries that count the vocabulary's rows.

    Of lists of tokens that are not to be written those that are gone are left out. Raises CheckpointError for an entry
    that names a token which is gone, and for a list of tokens that is none.
    """
    result: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            result[name] = with_new_ids(value, new, num_rows, where)
        elif value == num_rows and str(name).startswith("vocab_size"):
            result[name] = len(new)
        elif name in _LISTS and isinstance(value, list):
            rows = [_row(row, name, where) for row in value]
            result[name] = [[new[token] for token in row] for row in rows if all(token in new for token in row)]
        elif name in _PAIRS and isinstance(value, list):
            pairs = [_pair(pair, name, where) for pair in value]
            result[name] = [[place, _new_id(token, new, num_rows, name, where)] for place, token in pairs]
        elif _ONE.fullmatch(str(name)):
            ids = value if isinstance(value, list) else [value]
            found = [_new_id(number, new, num_rows, name, where) for number in ids]
            result[name] = found if isinstance(value, list) else found[0]
        elif _SEVERAL.fullmatch(str(name)) and isinstance(value, list):
            known = {_NO_TOKEN: _NO_TOKEN, **new}
            result[name] = [known[token] for token in _row(value, name, where) if token in known]
        else:
            result[name] = value
    return result


def _row(value: Any, name: str, where: str) -> list[int]:
    if not isinstance(value, list) or not all(_is_id(token) or token == _NO_TOKEN for token in value):
        raise _no_tokens(value, name, where, "ids of tokens")
    return value


def _pair(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise _no_tokens(value, name, where, "a place and the id of a token")
    return value


def _no_tokens(value: Any, name: str, where: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        "an entry of the model's settings lists no tokens", where=where, got=f"{name} {value!r}"[:80], wanted=wanted
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _new_id(value: Any, new: Ids, num_rows: int, name: str, where: str) -> Any:
    # Negative numbers and those beyond the rows stand for no token.
    if not _is_id(value) or value >= num_rows:
        return value
    if value not in new:
        raise CheckpointError(
            "a token that the model's settings name is not among those that stay",
            where=where,
            got=f"{name} {value}",
            do="make the list of tokens for this model: structprune vocabulary MODEL -o FILE",
        )
    return new[value]
