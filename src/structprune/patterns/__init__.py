"""Patterns: which single weights of a matrix may be zero, and how many. No model, no statistics.

Read first: `pattern.py`, what a pattern answers; then `unstructured.py` and `n_m.py`, the two that there are.
"""

from __future__ import annotations

import re

from structprune.errors import InputError
from structprune.patterns.n_m import NM
from structprune.patterns.pattern import Pattern, sparse
from structprune.patterns.unstructured import Unstructured

_UNSTRUCTURED = {"unstructured": None, "unstructured:row": "row", "unstructured:layer": "layer"}
_WANTED = "unstructured, unstructured:row, unstructured:layer, or N:M with N of M weights kept, such as 2:4"


def pattern_name(text: str | int) -> str:
    """Check what a recipe says, and return it as text. Raises InputError.

    YAML reads `2:4` as a number to base 60, 124; it is turned back.
    """
    name = f"{text // 60}:{text % 60}" if isinstance(text, int) and not isinstance(text, bool) else str(text)
    if name not in _UNSTRUCTURED and _groups(name) is None:
        raise InputError("--pattern is not usable", got=repr(text), wanted=_WANTED)
    return name


def share_of(name: str) -> float | None:
    """Return the share of zeros that a pattern says by itself; None where the recipe says it."""
    groups = _groups(name)
    return None if groups is None else groups.share


def as_pattern(name: str, share: float, scope: str) -> Pattern:
    """Build the pattern `name`, with its share of zeros and the scope of counts where it does not say them itself.

    Raises InputError for a name that is none.
    """
    groups = _groups(pattern_name(name))
    if groups is not None:
        return groups
    chosen = _UNSTRUCTURED[name] or scope
    return Unstructured(share=share, scope="row" if chosen == "row" else "layer")


def _groups(name: str) -> NM | None:
    found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", name)
    if found is None:
        return None
    keep, of = int(found[1]), int(found[2])
    if not 0 < keep < of:
        raise InputError(
            "--pattern keeps all of a group or nothing of it", got=name, wanted="N:M with 0 < N < M, such as 2:4"
        )
    return NM(keep=keep, of=of)


__all__ = ["NM", "Pattern", "Unstructured", "as_pattern", "pattern_name", "share_of", "sparse"]
