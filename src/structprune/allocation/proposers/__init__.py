"""Searches over widths: who proposes the choices that are measured on the model.

Read first: `proposer.py`, what a search is; then `levels.py`, how a proposer moves between widths within a budget; then
`evolution.py`.
"""

from structprune.allocation.proposers.proposer import Measured, Proposer, Rung, Search, SearchOptions
from structprune.registry import Registry

__all__ = ["SEARCHES", "Measured", "Proposer", "Rung", "Search", "SearchOptions"]

SEARCHES: Registry[Search] = Registry(
    "search",
    Search,
    {
        "evopress": "structprune.allocation.proposers.evolution:EVOPRESS",
        "tyr": "structprune.allocation.proposers.evolution:TYR",
        "darwinlm": "structprune.allocation.proposers.evolution:DARWINLM",
        "spdy": "structprune.allocation.proposers.spdy:SPDY",
        "regression": "structprune.allocation.proposers.regression:REGRESSION",
        "bypass": "structprune.allocation.proposers.policy:BYPASS",
        "graph": "structprune.allocation.proposers.policy:GRAPH",
        "grid": "structprune.allocation.proposers.rows:GRID",
        "progression": "structprune.allocation.proposers.rows:PROGRESSION",
        "exact": "structprune.allocation.proposers.exact:EXACT",
        "random": "structprune.allocation.proposers.evolution:RANDOM",
    },
    group="structprune.searches",
)
