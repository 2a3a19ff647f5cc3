"""Bytes of the process that loads the finished checkpoint, and so which way it loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ReloadMode = Literal["whole", "streamed"]

RELOAD_TOKENS = 32
"""Positions whose logits are compared."""
# Activations of these few tokens, allocator slack, thread stacks.
_RUNTIME_BYTES = 64 * 2**20
# The reader copies large tensors out of the file's mapping in chunks of this size.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadBound:
    """What that process holds beside libraries and model classes, and what the run itself still holds meanwhile."""

    run_bytes: int
    casts: bool
    """Whether weights are stored in another dtype than they are computed with."""
    largest_bytes: int
    """The largest tensor in the dtype that is computed with."""
    item_bytes: int
    vocab_size: int

    def bytes(self, mode: ReloadMode, num_parameters: int, file_bytes: int) -> int:
        """Return an upper bound on the bytes of both processes together."""
        logits = RELOAD_TOKENS * self.vocab_size * (self.item_bytes + 4 * 4)
        common = self.run_bytes + _RUNTIME_BYTES + logits
        if mode == "streamed":
            return common + self.largest_bytes + _CHUNK_BYTES
        # The loader maps the files, and weights of the same dtype stay where they are.
        return common + file_bytes + (num_parameters * self.item_bytes if self.casts else 0)

    def mode(self, num_parameters: int, file_bytes: int, budget_bytes: int) -> ReloadMode:
        """Choose to load the result as a user does, if that fits; else one module after the other."""
        return "whole" if self.bytes("whole", num_parameters, file_bytes) <= budget_bytes else "streamed"
