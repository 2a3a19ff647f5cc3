"""The tokens that llama.cpp finds in a text before it cuts anything: control tokens, and words that a user added."""

from __future__ import annotations

from collections.abc import Iterator

from structprune.exporters.gguf.entries import MARKED, TokenTable


class MarkedTokens:
    """Text -> what lies between its marked tokens, and their ids (llama.cpp, `tokenizer_st_partition`)."""

    def __init__(self, table: TokenTable) -> None:
        marked = set(table.of_kinds(*MARKED))
        self._ids = {token: index for index, token in enumerate(table.tokens) if token and token in marked}
        self._lengths: dict[str, set[int]] = {}
        for token in self._ids:
            self._lengths.setdefault(token[0], set()).add(len(token))

    def split(self, text: str) -> list[str | int]:
        """Split at the marked tokens, the longest (in bytes) first: pieces of text, and ids of what stood between."""
        found = {
            text[start : start + length]
            for start, character in enumerate(text)
            for length in self._lengths.get(character, ())
            if text[start : start + length] in self._ids
        }
        fragments: list[str | int] = [text]
        for token in sorted(found, key=lambda token: (-len(token.encode()), self._ids[token])):
            fragments = [piece for fragment in fragments for piece in _split(fragment, token, self._ids[token])]
        return [fragment for fragment in fragments if fragment != ""]


def _split(fragment: str | int, token: str, index: int) -> Iterator[str | int]:
    if isinstance(fragment, int):
        yield fragment
        return
    for number, piece in enumerate(fragment.split(token)):
        if number:
            yield index
        yield piece
