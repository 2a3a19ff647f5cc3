"""The exact choice for predicted losses, as a search: it is measured against the start, and nothing else is tried.

With losses that are corrected by measurements (`--search-anchors`) it is where every search starts.
"""

from __future__ import annotations

from collections.abc import Sequence

from structprune.allocation.exact import least_loss
from structprune.allocation.menu import Budget, Choice, Slot
from structprune.allocation.proposers.proposer import Rung, Search, SearchOptions
from structprune.allocation.proposers.rows import Listed


def exact(slots: Sequence[Slot], budget: Budget, start: Choice, options: SearchOptions) -> Listed:
    """List the choice of least predicted loss, if it is another than the start."""
    found = least_loss(slots, budget)
    return Listed([] if found == start else [found], start)


EXACT = Search(
    title="The choice of least predicted loss",
    paper="arXiv 2411.19146",
    provenance="published formula",
    propose=exact,
    generations=1,
    children=1,
    rungs=(Rung(windows=8),),
)
