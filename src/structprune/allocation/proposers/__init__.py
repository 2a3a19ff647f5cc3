"""Searches over widths: who proposes the choices that are measured on the model.

Read first: `proposer.py`, what a search is; then `levels.py`, how a proposer moves between widths within a budget.
"""

from structprune.allocation.proposers.proposer import Measured, Proposer, Rung, Search, SearchOptions
from structprune.registry import Registry

__all__ = ["SEARCHES", "Measured", "Proposer", "Rung", "Search", "SearchOptions"]

SEARCHES: Registry[Search] = Registry(
    "search",
    Search,
    {
        "evopress": "structprune.allocation.proposers.evolution:EVOPRESS",
    },
    group="structprune.searches",
)
