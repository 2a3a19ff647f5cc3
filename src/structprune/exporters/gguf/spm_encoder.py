"""How llama.cpp cuts a text by a tokenizer of its kind `llama`: SentencePiece's BPE, pairs merged by their score.

Written here to know before a file is written whether llama.cpp will give the ids of the model's own tokenizer.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from structprune.exporters.gguf.entries import TokenTable
from structprune.exporters.gguf.marked_tokens import MarkedTokens

SPACE = "\u2581"
"""What stands for a space in a token."""


class SpmEncoder:
    """Text -> ids, as llama.cpp's `llm_tokenizer_spm` does it, without the tokens at the ends of a text.

    The text is split at marked tokens, the longest first. What lies between gets its spaces marked, one more in front
    where `add_space_prefix` says so, and falls into characters. Of all neighbours that together are a token the pair
    with the highest score is merged, the leftmost of equal ones, until there is none; a character that is no token
    becomes its bytes.
    """

    def __init__(self, table: TokenTable, scores: Sequence[float], *, add_space_prefix: bool) -> None:
        self._ids = {token: index for index, token in enumerate(table.tokens)}
        self._scores = scores
        self._prefix = add_space_prefix
        self._marked = MarkedTokens(table)

    def encode(self, text: str) -> list[int]:
        """Encode `text`, in which marked tokens count by their exact characters."""
        ids: list[int] = []
        prefix = self._prefix
        for fragment in self._marked.split(text):
            if isinstance(fragment, int):
                ids.append(fragment)
                prefix = self._prefix
            else:
                ids += self._merged((" " * prefix + fragment).replace(" ", SPACE))
                prefix = False
        return ids

    def _merged(self, text: str) -> list[int]:
        """Merge the characters of a piece without marked tokens."""
        # Each symbol is text[start : ends[start]]; the start of the one before it is kept to find its neighbours.
        ends = list(range(1, len(text) + 1))
        before = list(range(-1, len(text) - 1))
        gone = [False] * len(text)
        queue: list[tuple[float, int, int, int]] = []

        def propose(left: int, right: int) -> None:
            if left < 0 or right >= len(text):
                return
            index = self._ids.get(text[left : ends[right]])
            if index is not None:
                heapq.heappush(queue, (-self._scores[index], left, right, ends[right]))

        for right in range(1, len(text)):
            propose(right - 1, right)
        while queue:
            _, left, right, end = heapq.heappop(queue)
            if gone[left] or gone[right] or ends[right] != end:
                # One of the two has become part of another token since.
                continue
            ends[left], gone[right] = end, True
            if end < len(text):
                before[end] = left
            propose(before[left], left)
            propose(left, end)
        return [
            index for start in range(len(text)) if not gone[start] for index in self._token(text[start : ends[start]])
        ]

    def _token(self, text: str) -> Iterator[int]:
        if text in self._ids:
            yield self._ids[text]
            return
        for value in text.encode():
            # A byte without a token of its own is looked up as a character.
            yield self._ids[byte_token(value) if byte_token(value) in self._ids else chr(value)]


def byte_token(value: int) -> str:
    """Name the token of a byte: `<0x0A>`."""
    return f"<0x{value:02X}>"
