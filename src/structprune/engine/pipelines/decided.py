"""What decides how much goes in the place of a share: widths from outside, or limits of the result."""

from __future__ import annotations

from collections.abc import Sequence

from structprune.allocation import ALLOCATORS
from structprune.architectures.stock.model import StockModel
from structprune.engine.planning.limits import Limit, implied_share
from structprune.engine.planning.widths import share_removed
from structprune.errors import UnsupportedError
from structprune.kinds import UnitKind
from structprune.recipe import Recipe, flag_name
from structprune.recipe.limits import targets_of
from structprune.recipe.units import ResolvedUnits, UnitsRecipe

# Where none is asked for: the allocator of several limits, and that of one which does not grow evenly with the units.
SEVERAL_ALLOCATOR = "milp"
UNEVEN_ALLOCATOR = "dp"
_OUTSIDE_ALLOCATOR = "widths"


def with_widths(recipe: UnitsRecipe, kinds: Sequence[UnitKind], stock: StockModel) -> UnitsRecipe:
    """Put what the widths decide into the recipe: the sparsity, and that no block is held to anything else.

    Raises InputError for widths that are not the model's, UnsupportedError for settings that would decide them too.
    """
    decided = {
        "sparsity": share_removed(stock, kinds, recipe.widths),
        "allow_block_removal": any(0 in block.values() for block in recipe.widths.blocks.values()),
        "allocator": _OUTSIDE_ALLOCATOR,
        "temperature": 0.0,
        "min_retention": UnitsRecipe.model_fields["min_retention"].default,
        "max_retention": 1.0,
        "outer_iterations": 0,
        "search": UnitsRecipe.model_fields["search"].default,
        "protect_first": 0,
        "protect_last": 0,
    }
    asked = {name: getattr(recipe, name) for name in decided if name in recipe.model_fields_set} | targets_of(recipe)
    # A sublayer that the widths leave without units needs no permission, and permission is none to keep them.
    asked.pop("allow_block_removal", None)
    other = {name: value for name, value in asked.items() if value is not None and value != decided.get(name)}
    if other:
        raise UnsupportedError(
            f"{', '.join(map(flag_name, other))} and --widths would decide the same thing",
            got=", ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in other.values()),
            wanted=f"--widths alone, which removes {decided['sparsity']:.4%} of the scope",
        )
    return recipe.model_copy(update=decided)


def allocator_for(limits: Sequence[Limit]) -> str | None:
    """Return the allocator that limits need where none is asked for; None: they need no special one."""
    if len(limits) > 1:
        return SEVERAL_ALLOCATOR
    return UNEVEN_ALLOCATOR if any(limit.is_uneven for limit in limits) else None


def with_limits(
    resolved: ResolvedUnits,
    limits: Sequence[Limit],
    asked: UnitsRecipe,
    stock: StockModel,
    kinds: Sequence[UnitKind],
) -> ResolvedUnits:
    """Let the recipe say which share its limits take, where it has some.

    Raises UnsupportedError for a share that is asked for beside them, and for an allocator that cannot hold them.
    """
    if not limits:
        return resolved
    share = implied_share(stock, kinds, limits)
    check_share(asked, share)
    if len(limits) > 1 and not ALLOCATORS.get(resolved.allocator).holds_several:
        raise UnsupportedError(
            f"the {resolved.allocator} allocator holds one limit",
            got=", ".join(flag_name(limit.field) for limit in limits),
            wanted=f"--allocator {SEVERAL_ALLOCATOR}, or one of them",
        )
    uneven = [limit for limit in limits if limit.is_uneven]
    if uneven and not ALLOCATORS.get(resolved.allocator).weighs_widths:
        raise UnsupportedError(
            f"the {resolved.allocator} allocator takes every unit of a sublayer to weigh the same",
            got=flag_name(uneven[0].field),
            wanted=f"--allocator {UNEVEN_ALLOCATOR}",
        )
    return resolved.model_copy(update={"sparsity": share})


def check_share(asked: Recipe, share: float) -> None:
    """Raise UnsupportedError if another share is asked for than the one that the limits take."""
    if "sparsity" in asked.model_fields_set and asked.sparsity != share:
        raise UnsupportedError(
            f"{', '.join(map(flag_name, targets_of(asked)))} and --sparsity would decide the same thing",
            got=f"--sparsity {asked.sparsity:g}",
            wanted="limits, or a share",
        )
