"""How llama.cpp cuts a text by a tokenizer of its kind `t5`: SentencePiece's Unigram, the likeliest pieces.

As spm_encoder.py for the other kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from structprune.exporters.gguf.entries import TokenTable
from structprune.exporters.gguf.marked_tokens import MarkedTokens
from structprune.exporters.gguf.spm_encoder import SPACE

_UNKNOWN_PENALTY = 10.0
"""How much less likely than the unlikeliest piece a character is that is none."""


class UnigramEncoder:
    """Text -> ids, as llama.cpp's `llm_tokenizer_ugm` does it without a table of normal forms.

    The text is split at marked tokens. What lies between gets its spaces marked, one more in front of the first other
    character where `add_space_prefix` says so, and is cut into the pieces whose scores have the largest sum (the
    search of Viterbi). Characters that are no piece are unknown, neighbours of them together.
    """

    def __init__(self, table: TokenTable, scores: Sequence[float], *, add_space_prefix: bool) -> None:
        # The file holds float32, llama.cpp adds them up in float64.
        stored: list[float] = np.asarray(scores, dtype=np.float32).tolist()
        normal, words = set(table.of_kinds("NORMAL")), set(table.of_kinds("USER_DEFINED"))
        pieces = normal | words | set(table.of_kinds("UNUSED"))
        self._prefix = add_space_prefix
        self._marked = MarkedTokens(table)
        self._pieces = {token: index for index, token in enumerate(table.tokens) if token in pieces}
        self._scores = {token: 0.0 if token in words else stored[index] for token, index in self._pieces.items()}
        self._unknown = next((table.tokens.index(token) for token in table.of_kinds("UNKNOWN")), -1)
        self._lowest = min(self._scores[token] for token in normal) - _UNKNOWN_PENALTY
        self._longest = max(map(len, pieces))

    def encode(self, text: str) -> list[int]:
        """Encode `text`, in which marked tokens count by their exact characters."""
        ids: list[int] = []
        for fragment in self._marked.split(text):
            if isinstance(fragment, int):
                ids.append(fragment)
                continue
            spaced = re.sub(r"[^ ]", r" \g<0>", fragment, count=1) if self._prefix else fragment
            ids += self._likeliest(spaced.replace(" ", SPACE))
        return ids

    def _likeliest(self, text: str) -> list[int]:
        sums = [0.0, *([-math.inf] * len(text))]
        starts = [0] * (len(text) + 1)
        chosen = [self._unknown] * (len(text) + 1)
        for start in range(len(text)):
            pieces = [text[start : start + length] for length in range(1, min(self._longest, len(text) - start) + 1)]
            ways = [(self._scores[piece], self._pieces[piece], piece) for piece in pieces if piece in self._pieces]
            if text[start] not in self._pieces:
                ways.append((self._lowest, self._unknown, text[start]))
            for score, index, piece in ways:
                end = start + len(piece)
                if sums[start] + score > sums[end]:
                    sums[end], starts[end], chosen[end] = sums[start] + score, start, index
        ids: list[int] = []
        end = len(text)
        while end:
            if not (ids and ids[-1] == self._unknown == chosen[end]):
                ids.append(chosen[end])
            end = starts[end]
        return ids[::-1]
