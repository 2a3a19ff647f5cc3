"""Structured pruning of large language models in bounded memory.

>>> from structprune import Recipe, prune
>>> report = prune("smollm2", Recipe(sparsity=0.3), "out/smaller")  # doctest: +SKIP

Read first: `api.py`, the entry points; then docs/architecture.md, which names eight files that show how a run works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structprune.api import prune, recover
    from structprune.comparison.shares import prune_shares
    from structprune.modules.compaction import compact
    from structprune.modules.layout import layout
    from structprune.modules.prune import prune_module
    from structprune.modules.settings import ModuleRecipe
    from structprune.recipe import Recipe
    from structprune.recipe.training import RecoverySettings
    from structprune.results.recovery import RecoveryReport
    from structprune.results.report import PruneReport

__version__ = "0.1.0"
__all__ = [
    "ModuleRecipe",
    "PruneReport",
    "Recipe",
    "RecoveryReport",
    "RecoverySettings",
    "__version__",
    "compact",
    "layout",
    "prune",
    "prune_module",
    "prune_shares",
    "recover",
]

_LAZY = {
    "prune": "structprune.api",
    "prune_shares": "structprune.comparison.shares",
    "layout": "structprune.modules.layout",
    "compact": "structprune.modules.compaction",
    "prune_module": "structprune.modules.prune",
    "ModuleRecipe": "structprune.modules.settings",
    "recover": "structprune.api",
    "Recipe": "structprune.recipe",
    "RecoverySettings": "structprune.recipe.training",
    "PruneReport": "structprune.results.report",
    "RecoveryReport": "structprune.results.recovery",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `structprune --help` should not.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
