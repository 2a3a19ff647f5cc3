"""Limits of what a run leaves: the most that the result may have of a quantity, and what has to go for that.

An allocator holds the widths to them; where whole blocks go, as few go as they allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from structprune.architectures.stock.model import StockModel
from structprune.engine.planning.quantities import QUANTITIES, Asked, Quantity, SublayerSizes, block_cache_bytes
from structprune.errors import InputError
from structprune.kinds import UnitKind
from structprune.recipe import ResolvedRecipe, flag_name
from structprune.recipe.limits import targets_of
from structprune.results.sizes import LimitReport, SizeReport, shown_amount
from structprune.types import BlockLayout

_ALMOST_ALL = 1 - 1e-9
Sublayer = tuple[int, UnitKind]
"""Number of a block and kind of its units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The most of one quantity that the result may have."""

    field: str
    """The recipe's."""
    quantity: Quantity
    name: str
    at_most: int
    asked: Asked
    """The run that it is a limit of."""
    before: int
    """What the result would have if no unit went."""
    sizes: Mapping[Sublayer, SublayerSizes]

    @property
    def removal(self) -> int:
        """How much of the quantity has to go; not above zero where nothing has to."""
        return self.before - self.at_most

    def predicted(self, kept: Mapping[str, Sequence[int]]) -> int:
        """Return what the result has when so many units are kept, kind -> units of each block."""
        return self.before - sum(
            size.units.kept(size.num_units) - size.units.kept(kept[kind][block])
            for (block, kind), size in self.sizes.items()
        )

    def shown(self, number: int) -> str:
        """Write an amount of the quantity."""
        return shown_amount(number, self.quantity.counts)

    @property
    def is_uneven(self) -> bool:
        """Whether what a sublayer adds does not grow evenly with its units."""
        return any(size.units.table for size in self.sizes.values())


def find_limits(stock: StockModel, recipe: ResolvedRecipe, kinds: Sequence[UnitKind] = ()) -> list[Limit]:
    """List the limits that a recipe asks for, in the order of its fields; none where a share decides.

    Without `kinds` whole blocks go. Raises InputError for a limit that the model meets as it is or that nothing in
    scope has a part in, UnsupportedError for one that is not known of this model.
    """
    asked, limits = Asked(stock=stock, recipe=recipe, kinds=kinds), list[Limit]()
    for field, value in targets_of(recipe).items():
        quantity = QUANTITIES[field]
        sizes: dict[Sublayer, SublayerSizes] = {
            (block.index, kind): quantity.sizes(asked, block, block.group(kind))
            for kind in kinds
            for block in stock.layout.blocks
            if block.has(kind)
        }
        limit = Limit(
            field=field,
            quantity=quantity,
            name=quantity.name(asked),
            asked=asked,
            at_most=quantity.at_most(asked, value),
            before=quantity.total(asked, stock.layout.blocks),
            sizes=sizes,
        )
        if kinds and not any(size.units.unit for size in sizes.values()):
            raise InputError(
                f"nothing in scope has a part in the {limit.name}",
                got=f"{flag_name(field)}, --scope {recipe.scope}",
                wanted="--scope attention or --scope all",
            )
        limits.append(limit)
    if limits and all(limit.removal <= 0 for limit in limits):
        raise InputError(
            "the model is within the limit already",
            got=", ".join(f"{flag_name(limit.field)} {limit.shown(limit.at_most)}" for limit in limits),
            wanted=" or ".join(f"less than {limit.shown(limit.before)}" for limit in limits),
        )
    return limits


def blocks_within(stock: StockModel, recipe: ResolvedRecipe, limits: Sequence[Limit], most: int) -> int:
    """Return the fewest blocks, all of one shape, that must go for all limits to be met, whichever they are.

    Raises InputError if not even `most` are enough.
    """
    counts = [0]
    for limit in limits:
        left = [blocks_left(stock, recipe, limit, removed) for removed in range(most + 1)]
        check_within(limit, limit.before - left[-1])
        counts.append(next(removed for removed, size in enumerate(left) if size <= limit.at_most))
    return max(counts)


def blocks_left(stock: StockModel, recipe: ResolvedRecipe, limit: Limit, removed: int) -> int:
    """Return the most that a result has of a limited quantity when so many blocks are gone."""
    asked = Asked(stock=stock, recipe=recipe, kinds=())

    def alone(block: BlockLayout) -> int:
        return block_cache_bytes(stock, block, asked.tokens) if asked.tokens else 0

    # Of equal blocks some may have a shorter window: those are taken to be the ones that go.
    largest = sorted(stock.layout.blocks, key=alone, reverse=True)
    return limit.quantity.total(asked, largest[: len(largest) - removed])


def check_within(limit: Limit, most: int) -> None:
    """Raise InputError if a limit asks for more to go than `most`."""
    if limit.removal > most:
        raise InputError(
            f"{flag_name(limit.field)} cannot be reached",
            got=limit.shown(limit.at_most),
            wanted=f"at least {limit.shown(limit.before - most)}, what stays when as much goes as may",
            do="raise it, or let more go: a wider --scope, --allow-block-removal, a smaller --min-retention, fewer "
            "protected blocks",
        )


def implied_share(stock: StockModel, kinds: Sequence[UnitKind], limits: Sequence[Limit]) -> float:
    """Return the share of the scope's parameters that the limits take, as if each took its sublayers evenly."""
    parameters = {
        (block.index, kind): block.module_parameters(block.group(kind))
        for kind in kinds
        for block in stock.layout.blocks
        if block.has(kind)
    }
    shares = [0.0]
    for limit in limits:
        holding = [place for place, size in limit.sizes.items() if size.units.unit]
        taken = limit.removal / max(1, sum(limit.sizes[place].module for place in holding))
        shares.append(taken * sum(parameters[place] for place in holding) / sum(parameters.values()))
    # Of a module's biases some may belong to no unit: all of the units are less than all of it.
    return min(max(shares), _ALMOST_ALL)


def limit_reports(
    limits: Sequence[tuple[Limit, int]],
    written: StockModel,
    size: SizeReport,
) -> list[LimitReport]:
    """Put together what was asked, what was promised (beside each limit), and what the written model has."""
    return [
        LimitReport(
            name=limit.name,
            counts=limit.quantity.counts,
            at_most=limit.at_most,
            before=limit.before,
            predicted=predicted,
            reached=limit.quantity.reached(replace(limit.asked, stock=written), size),
        )
        for limit, predicted in limits
    ]
