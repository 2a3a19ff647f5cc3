"""Resolved recipes without a run: what a method says, for tests of single parts of the engine."""

from __future__ import annotations

from typing import Any

from structprune.methods import METHODS
from structprune.recipe import Recipe
from structprune.recipe.units import ResolvedUnits


def resolved_units(method: str, **changes: Any) -> ResolvedUnits:
    """A recipe of `method` with its own score, solver and so forth, and 1 GiB of memory."""
    entry = METHODS.get(method)
    settings = {
        "memory": 2**30,
        "device_memory": 0,
        "head_units": entry.head_units,
        "multiple_of": 1,
        "damping": entry.damping,
        "shrinkage": entry.shrinkage,
        "score": entry.score,
        "allocator": entry.allocator,
        "solver": entry.solver,
        "target": entry.target,
        "structure": "per-layer",
        "temperature": entry.temperature,
        "protect_first": 0,
        "protect_last": 0,
        "sensitivity_samples": 4,
        "num_samples": 128,
        "time_budget": 0,
    }
    return ResolvedUnits.of(Recipe.build(method=method), **settings | changes)
