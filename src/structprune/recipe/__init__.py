"""Recipes: what a run is to do, from flags, YAML or Python.

Read first: `common.py`; then `fields.py`, how a setting is declared.
"""

from structprune.recipe.common import Recipe, Scope, default_sensitivity_samples
from structprune.recipe.fields import DEFAULT_SHARD_BYTES, ByteCount, Flag, Group, settings_fingerprint, validated

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "ByteCount",
    "Flag",
    "Group",
    "Recipe",
    "Scope",
    "default_sensitivity_samples",
    "settings_fingerprint",
    "validated",
]
