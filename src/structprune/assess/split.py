"""How what is to go is shared out to tokens and to units: at the place where a further parameter costs as much of both.

Where two losses each grow faster and faster, their sum is least there. Prices are measured between sizes; from the
middle of one step to the middle of the next they are taken to rise evenly, and never to fall. The comparison is our
own; no paper's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from structprune.architectures.sources.fewer_tokens import rows_by_token
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.model import StockModel
from structprune.assess.counting import TokenSource, row_width
from structprune.assess.vocabulary import PossibleSizes, planned, possible_sizes
from structprune.engine.planning.limits import find_limits
from structprune.engine.planning.widths import most_removed
from structprune.engine.resolve import check
from structprune.errors import InputError
from structprune.observer import Observer
from structprune.recipe import Recipe
from structprune.recipe.limits import TARGETS, targets_of
from structprune.recipe.tokens import AUTO_TOKENS, WantedTokens
from structprune.recipe.units import ResolvedUnits
from structprune.vocabulary.kept import ALL_TOKENS

_PARAMETERS = "target_parameters"
# What resolves a recipe whose limit is not shared out yet.
_A_LITTLE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """One smaller model."""

    name: str
    parameters: int
    """Parameters that went, of those of the dense model."""
    bits_per_byte: float
    """Mean of the texts."""
    price: float
    """Bits per byte that a million parameters cost, of those that went beyond the next larger vocabulary's."""

    def costs_no_less_than(self, other: Priced) -> bool:
        """Whether the parameters of another one cost no more than these do."""
        return other.price <= self.price

    @property
    def line(self) -> str:
        """Say what it costs."""
        return f"{self.name}: {self.bits_per_byte:.4f} bits per byte, {self.price:+.5f} for a million parameters more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How many parameters may go with tokens."""

    least: int
    """What no units can take in their place; 0 where no limit asks for so much."""
    most: int
    """All of what a limit asks for, or what goes with all tokens that may."""
    limit: int | None = None
    """What has to go with tokens and units together; None: nothing says it."""


def price_at(steps: Sequence[Priced], gone: float) -> float:
    """Return what a million parameters more cost where so many have gone, by steps from the dense model on."""
    prices = list(accumulate((step.price for step in steps), max))
    ends = [0, *(step.parameters for step in steps)]
    middles = [(first + last) / 2 for first, last in pairwise(ends)]
    place = bisect_right(middles, gone)
    if place in (0, len(middles)):
        return prices[min(place, len(middles) - 1)]
    first, last = middles[place - 1 : place + 1]
    return prices[place - 1] + (gone - first) / (last - first) * (prices[place] - prices[place - 1])


def tokens_share(tokens: Sequence[Priced], units: Sequence[Priced], room: Room) -> int:
    """Return how many parameters go with tokens: up to where a further one costs more than one of the units does.

    Where a limit is shared out, units take the rest of it: their price there counts. Without one it is that of the
    units that were measured.
    """

    def is_worth(gone: int) -> bool:
        rest = units[-1].parameters if room.limit is None else room.limit - gone
        return price_at(tokens, gone) <= price_at(units, rest)

    low, high = room.least, room.most
    # Prices never fall, so there is one place from which on they are higher.
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_worth(middle) else (low, middle - 1)
    return low


def why(gone: int, room: Room) -> str:
    """Say what has decided that so many parameters go with tokens."""
    if gone == room.most:
        return "none of them costs more than the MLP's channels do"
    if gone == room.least:
        return "the units in scope can give no more" if gone else "the first ones cost more than the MLP's channels do"
    return "a further one would cost more than the MLP's channels do"


def room_for(model: str | Path, recipe: Recipe, possible: PossibleSizes) -> Room:
    """Find how many parameters may go with tokens, by the limit of a recipe and by what its units can give.

    Raises InputError for a limit that both together cannot meet, and what `check` does.
    """
    most = possible.parameters(possible.least)
    if _PARAMETERS not in targets_of(recipe):
        return Room(least=0, most=most)
    # The units, as if neither tokens went nor a limit were there.
    alone = {
        **dict.fromkeys(type(recipe).model_fields.keys() & set(TARGETS)),
        "sparsity": _A_LITTLE,
        "num_samples": recipe.most_samples,
        "time_budget": None,
    }
    resolved = check(model, recipe.with_tokens(ALL_TOKENS).model_copy(update=alone))
    stock, kinds = resolved.stock, resolved.kinds
    limited = resolved.recipe.model_copy(update={_PARAMETERS: targets_of(recipe)[_PARAMETERS]})
    (limit,) = find_limits(stock, limited, kinds if isinstance(limited, ResolvedUnits) else ())
    units = (
        most_removed(stock, resolved.recipe, kinds)
        if isinstance(resolved.recipe, ResolvedUnits)
        else stock.layout.block_parameters
    )
    if limit.removal > units + most:
        raise InputError(
            "--target-parameters cannot be reached",
            got=limit.shown(limit.at_most),
            wanted=f"at least {limit.shown(limit.before - units - most)}, what stays when as many tokens and units go "
            "as may",
            do="raise it, or let more go: a wider --scope, a smaller --min-retention, --drop-reserve",
        )
    return Room(least=max(0, limit.removal - units), most=min(most, limit.removal), limit=limit.removal)


def as_planned(model: str | Path, recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """Say how many tokens stay at most where the run decides it; returns what to say of that too.

    Raises what `room_for` does.
    """
    if recipe.vocabulary != AUTO_TOKENS:
        return recipe, ()
    possible = possible_sizes(TokenSource.open(model, recipe.merge_adapter), recipe)
    said = "how many tokens stay is decided by the run, which measures some sizes first; "
    if recipe.scope == "vocabulary":
        size = possible.within(1)
        said += f"in these figures {size:,}, the most with which some go"
    elif least := room_for(model, recipe, possible).least:
        size = possible.within(least)
        said += f"in these figures {size:,}, with which the units in scope just meet the limit"
    else:
        return recipe.with_tokens(ALL_TOKENS), (f"{said}all are in these figures",)
    return recipe.model_copy(update={"vocabulary": WantedTokens(size=size)}), (said,)


def decided_for_a_check(model: str | Path, recipe: Recipe) -> Recipe:
    """Return a recipe with as many tokens as a run of it would have at most, none of them counted.

    Raises what `as_planned` and `planned` do.
    """
    return planned(model, as_planned(model, recipe)[0])[0]


def without_units(model: str | Path, recipe: Recipe, observer: Observer) -> Recipe:
    """Return a recipe of tokens alone where those that go meet a limit of parameters; else the recipe."""
    if not recipe.tokens or list(targets_of(recipe)) != [_PARAMETERS]:
        return recipe
    base = open_model(str(model), adapter=recipe.merge_adapter)
    num_rows, _ = rows_by_token(base)
    gone = (num_rows - len(recipe.tokens.ids)) * row_width(base)
    removal = StockModel(base).layout.all_parameters - targets_of(recipe)[_PARAMETERS]
    if not 0 < removal <= gone:
        return recipe
    observer.note("the tokens that go meet the limit: all units stay")
    left = {"method", "sparsity", "scope", *TARGETS}
    common = {name: getattr(recipe, name) for name in Recipe.model_fields.keys() & recipe.model_fields_set - left}
    return Recipe.build(**common, scope="vocabulary")
