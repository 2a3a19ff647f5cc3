"""Limits of what a run leaves, and what every sublayer's units add to the sums that are limited.

A quantity is a sum over the whole model that grows by as much with every unit of a sublayer: parameters, bytes of the
weight files, bytes of the KV cache. A limit names one and the most that the result may have of it. What must go follows
from that, and an allocator holds the widths to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from structprune.allocation.budget import Sizes
from structprune.architectures.families.common import head_size
from structprune.architectures.stock.model import StockModel
from structprune.architectures.units import missing_biases
from structprune.engine.planning.tensors import (
    BlockTensors,
    TensorForecast,
    cut_tensors,
    file_bytes,
    result_tensors,
)
from structprune.errors import InputError, UnsupportedError
from structprune.kinds import UNIT_KINDS, UnitKind
from structprune.memory import format_bytes
from structprune.recipe import ResolvedRecipe, flag_name
from structprune.recipe.limits import KvCacheLimit, targets_of
from structprune.recipe.repaired import repair_adds_biases
from structprune.recipe.units import ResolvedUnits
from structprune.results.schema import LimitReport, SizeReport
from structprune.solvers import SOLVERS
from structprune.types import BlockLayout, UnitGroup

_ALMOST_ALL = 1 - 1e-9
Sublayer = tuple[int, UnitKind]
"""Number of a block and kind of its units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SublayerSizes:
    """What one sublayer adds to a quantity."""

    num_units: int
    units: Sizes
    module: int
    """What all of its module adds, parameters that belong to no unit too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The run that is asked about."""

    stock: StockModel
    recipe: ResolvedRecipe
    kinds: Sequence[UnitKind]
    """Kinds whose units may go; none where whole blocks do."""

    @property
    def tokens(self) -> int:
        """Length of the sequence whose cache is limited."""
        return targets_of(self.recipe)["target_kv_cache"].tokens

    def new_biases(self, block: BlockLayout) -> Mapping[str, tuple[int, ...]]:
        """Return the biases that the result may have and the source lacks, name -> shape at full width."""
        recipe = self.recipe
        adds = isinstance(recipe, ResolvedUnits) and "biases" in SOLVERS.get(recipe.solver).changes
        kinds = UNIT_KINDS if repair_adds_biases(recipe) else tuple(self.kinds) if adds else ()
        return missing_biases(block, kinds)

    def item_bytes(self, block: BlockLayout, name: str) -> int:
        """Return the bytes of one number of a tensor as it is written; a new bias is stored like its weight."""
        return self.stock.reader.dtypes[block.prefix + _model_for(block, name)].itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A sum over a model that a run can be held to."""

    name: str
    """What is counted, in words; `{tokens}` stands for those of a cache."""
    total: Callable[[Asked, Sequence[BlockLayout]], int]
    """What a result of these blocks has, all of whose units are there."""
    sizes: Callable[[Asked, BlockLayout, UnitGroup], SublayerSizes]
    """What a sublayer, given by its first group, adds. Raises UnsupportedError where that is not known."""
    reached: Callable[[StockModel, int, SizeReport], int]
    """What the written model has, from (model, tokens, size)."""
    at_most: Callable[[Any], int] = int
    """The most, from the value of the recipe's field."""
    in_bytes: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The most of one quantity that the result may have."""

    field: str
    """The recipe's."""
    quantity: Quantity
    name: str
    at_most: int
    tokens: int
    """Length of the sequence in a cache; 0 for what has none."""
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
        return format_bytes(number) if self.quantity.in_bytes else f"{number:,}"


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
        tokens = value.tokens if isinstance(value, KvCacheLimit) else 0
        limit = Limit(
            field=field,
            quantity=quantity,
            name=quantity.name.format(tokens=f"{tokens:,}"),
            tokens=tokens,
            at_most=quantity.at_most(value),
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
        return _block_cache_bytes(stock, block, limit.tokens) if limit.tokens else 0

    # Of equal blocks some may have a shorter window: those are taken to be the ones that go.
    largest = sorted(stock.layout.blocks, key=alone, reverse=True)
    return limit.quantity.total(asked, largest[: len(largest) - removed])


def check_within(limit: Limit, most: int) -> None:
    """Raise InputError if a limit asks for more to go than `most`."""
    if limit.removal > most:
        raise InputError(
            f"{flag_name(limit.field)} cannot be reached",
            got=limit.shown(limit.at_most),
            wanted=f"at least {limit.before - most:,}{' bytes' if limit.quantity.in_bytes else ''}, what stays when "
            "as much goes as may",
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
            in_bytes=limit.quantity.in_bytes,
            at_most=limit.at_most,
            before=limit.before,
            predicted=predicted,
            reached=limit.quantity.reached(written, limit.tokens, size),
        )
        for limit, predicted in limits
    ]


def _model_for(block: BlockLayout, name: str) -> str:
    """Return the tensor of the source that another one is stored like."""
    return name if name in block.shapes else f"{name.removesuffix('.bias')}.weight"


def _stored_sizes(asked: Asked, block: BlockLayout, group: UnitGroup, item: Callable[[str], int]) -> SublayerSizes:
    """Count what is stored of a sublayer; `item` is what one number of a tensor counts."""
    biases = {name: shape for name, shape in asked.new_biases(block).items() if name.startswith(group.module_prefix)}
    unit = 0
    for one in block.groups_of(group.kind):
        for part in one.slices:
            shape = block.shapes[part.tensor]
            unit += math.prod(shape) // shape[part.axis] * part.width * part.repeat * item(part.tensor)
        for part in one.producers:
            bias = f"{part.tensor.removesuffix('.weight')}.bias"
            if bias in biases:
                unit += part.width * part.repeat * item(bias)
    whole = sum(math.prod(block.shapes[name]) * item(name) for name in block.sublayer_tensors(group.kind))
    whole += sum(math.prod(shape) * item(name) for name, shape in biases.items())
    return SublayerSizes(
        num_units=group.num_units,
        units=Sizes(unit=unit, rest=whole - group.num_units * unit),
        module=sum(math.prod(block.shapes[name]) * item(name) for name in block.module_tensors(group)),
    )


def _with_biases(asked: Asked, block: BlockLayout) -> BlockTensors:
    yield from cut_tensors(block, {})
    for name, shape in asked.new_biases(block).items():
        yield name, _model_for(block, name), shape


def _whole_tensors(asked: Asked, blocks: Sequence[BlockLayout]) -> Mapping[str, TensorForecast]:
    """Return the tensors of a result of these blocks with every unit."""
    return result_tensors(asked.stock, asked.recipe, blocks, lambda block: _with_biases(asked, block))


def _cache_numbers(stock: StockModel, index: int) -> int:
    """Count the numbers that a block's attention keeps of each token: a key and a value of every KV head."""
    config = stock.block_configs[index]
    return 2 * _num_kv_heads(config) * head_size(config)


def _num_kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _cached_tokens(stock: StockModel, index: int, tokens: int) -> int:
    """Count the tokens that a block keeps keys and values of: all, or those in its window."""
    config: Any = stock.block_configs[index]
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is None or (types is not None and types[index] != "sliding_attention"):
        return tokens
    return min(tokens, window)


def _cache_item(stock: StockModel, block: BlockLayout) -> int:
    """Return the bytes of a number of the cache, which is in the number format of the attention's weights."""
    return stock.reader.dtypes[block.prefix + block.group("attention").consumer.tensor].itemsize


def _block_cache_bytes(stock: StockModel, block: BlockLayout, tokens: int) -> int:
    if not block.has("attention"):
        return 0
    kept = _cached_tokens(stock, block.index, tokens)
    return _cache_numbers(stock, block.index) * kept * _cache_item(stock, block)


def _cache_bytes(stock: StockModel, blocks: Sequence[BlockLayout], tokens: int) -> int:
    """Count the bytes of keys and values of one sequence."""
    return sum(_block_cache_bytes(stock, block, tokens) for block in blocks)


def _cache_sizes(asked: Asked, block: BlockLayout, group: UnitGroup) -> SublayerSizes:
    """Count what a KV head adds to the cache; channels of an MLP add nothing."""
    if group.kind != "attention":
        return SublayerSizes(num_units=group.num_units, units=Sizes(unit=0), module=0)
    if asked.stock.head_units != "kv-group":
        raise UnsupportedError(
            "keys and values are kept of every KV head, and only whole KV heads take theirs with them",
            got=f"--target-kv-cache, --head-units {asked.stock.head_units}",
            wanted="--head-units kv-group",
        )
    stock, config = asked.stock, asked.stock.block_configs[block.index]
    rows = sum(part.width * part.repeat for part in group.producers if len(block.shapes[part.tensor]) > 1)
    # A unit's rows are those of its queries, as many as the consumer reads, and of one key and one value.
    if group.num_units != _num_kv_heads(config) or rows - group.width != 2 * head_size(config):
        raise UnsupportedError(
            "what this attention keeps of each token is not described",
            where=f"block {block.index}",
            got=f"--target-kv-cache of a {stock.family.name} model",
            do="use --target-parameters or --target-bytes",
        )
    unit = 2 * head_size(config) * _cached_tokens(stock, block.index, asked.tokens) * _cache_item(stock, block)
    return SublayerSizes(num_units=group.num_units, units=Sizes(unit=unit), module=group.num_units * unit)


QUANTITIES: Mapping[str, Quantity] = {
    "target_parameters": Quantity(
        name="parameters",
        in_bytes=False,
        total=lambda asked, blocks: sum(math.prod(tensor.shape) for tensor in _whole_tensors(asked, blocks).values()),
        sizes=lambda asked, block, group: _stored_sizes(asked, block, group, lambda name: 1),
        reached=lambda written, tokens, size: size.parameters_after,
    ),
    "target_bytes": Quantity(
        name="bytes of the weight files",
        total=lambda asked, blocks: file_bytes(_whole_tensors(asked, blocks), asked.recipe.max_shard_size),
        sizes=lambda asked, block, group: _stored_sizes(
            asked, block, group, lambda name: asked.item_bytes(block, name)
        ),
        reached=lambda written, tokens, size: size.bytes_after,
    ),
    "target_kv_cache": Quantity(
        name="bytes of the KV cache of {tokens} tokens",
        at_most=lambda value: value.at_most,
        total=lambda asked, blocks: _cache_bytes(asked.stock, blocks, asked.tokens),
        sizes=_cache_sizes,
        reached=lambda written, tokens, size: _cache_bytes(written, written.layout.blocks, tokens),
    ),
}
"""Field of the recipe -> what it limits. Headers of files are counted as those of all units, which are no shorter."""
