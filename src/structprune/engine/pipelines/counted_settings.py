"""Settings of the pipelines that remove whole blocks or experts: how many go, and what has no meaning there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from structprune.errors import UnsupportedError
from structprune.kinds import Structure
from structprune.methods.method import Method
from structprune.recipe import Recipe

_OF_UNITS = ("min_retention", "max_retention", "outer_iterations", "allow_block_removal")


def num_to_remove(sparsity: float, total: int) -> int:
    """The smallest number of `total` things, which are all alike, that is at least the share `sparsity` of them."""
    # The epsilon keeps 0.3 * 10 from becoming 4 through binary rounding.
    return math.ceil(sparsity * total - 1e-9)


def without_units(recipe: Recipe, method: Method, what: str, others: Mapping[str, Any]) -> Recipe:
    """The recipe of a method that takes or leaves `what` as a whole: nothing is shared out, solved or narrowed.

    `others` are fixed besides. Raises UnsupportedError for a setting that asks for something else.
    """
    fixed = {
        "solver": method.solver,
        "allocator": method.allocator,
        "target": method.target,
        "structure": Structure.UNIFORM,
        "damping": method.damping,
        "shrinkage": method.shrinkage,
        "temperature": method.temperature,
        "multiple_of": 1,
        "head_units": method.head_units,
        **{name: Recipe.model_fields[name].default for name in _OF_UNITS},
        **others,
    }
    for name, value in fixed.items():
        given = getattr(recipe, name)
        if given is not None and given != value:
            flag = f"--{name.replace('_', '-')}"
            raise UnsupportedError(
                f"{flag} has no meaning for {what}",
                got=str(given).lower() if isinstance(given, bool) else given,
                wanted=f"no {flag}",
            )
    return recipe.model_copy(update=fixed)
