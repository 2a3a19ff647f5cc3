"""What a text has in the place of a token that is gone: its first piece is what the model has to predict there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from structprune.vocabulary.ids import Ids
from structprune.vocabulary.tokenizer_json import added_tokens, all_tokens


def first_pieces(before: Mapping[str, Any], after: Mapping[str, Any], new: Ids, where: str) -> dict[int, int]:
    """Return, for each token of the tokenizer `before` that `after` lacks, the id there of its first piece.

    Tokens that stand for no text have none, nor those whose first piece is the unknown token. Where a tokenizer marks
    the continuations of words or their ends, tokens that are not whole words have none: they cannot be cut alone.
    """
    added = added_tokens(before)
    model: Any = Tokenizer.from_str(json.dumps(after)).model
    unknown = _unknown(after["model"])
    continues, ends = (after["model"].get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    found: dict[int, int] = {}
    for number, token in all_tokens(before, where).items():
        if number in new or token in added or (continues and token.startswith(continues)) or not token.endswith(ends):
            continue
        pieces = model.tokenize(token.removesuffix(ends))
        if pieces and pieces[0].id != unknown:
            found[number] = pieces[0].id
    return found


def _unknown(model: Mapping[str, Any]) -> int | None:
    """Return the id of the unknown token; None where there is none."""
    if model.get("type") == "Unigram":
        return model.get("unk_id")
    token = model.get("unk_token")
    return None if token is None else model["vocab"].get(token)
