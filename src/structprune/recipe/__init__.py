"""Recipes: what a run is to do, from flags, YAML or Python, and what it then works by.

Read first: `common.py` (what all have in common, and which class validates the rest), then `units.py`. Declarations of
fields are in `fields.py`; `training.py` has the settings of a recovery.
"""

from structprune.recipe.common import (
    DEFAULT_TIME_BUDGET_S,
    MOST_SAMPLES,
    RECIPES,
    RESOLVED,
    Recipe,
    ResolvedRecipe,
    all_fields,
    default_held_out,
    default_sensitivity_samples,
    flag_name,
)
from structprune.recipe.fields import DEFAULT_SHARD_BYTES, ByteCount, Flag, Group, settings_fingerprint, validated

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "DEFAULT_TIME_BUDGET_S",
    "MOST_SAMPLES",
    "RECIPES",
    "RESOLVED",
    "ByteCount",
    "Flag",
    "Group",
    "Recipe",
    "ResolvedRecipe",
    "all_fields",
    "default_held_out",
    "default_sensitivity_samples",
    "flag_name",
    "settings_fingerprint",
    "validated",
]
