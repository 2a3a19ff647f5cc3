"""Quantities that a run can be held to: what a whole model has of each, and what every unit of a sublayer adds.

A quantity is a sum over the model that grows by as much with every unit of a sublayer: parameters, bytes of the weight
files, bytes of the KV cache. Time is one too, but grows unevenly: what each width takes is read from a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from structprune.allocation.budget import Sizes
from structprune.architectures.families.common import head_size
from structprune.architectures.stock.model import StockModel
from structprune.architectures.units import missing_biases
from structprune.engine.planning.gguf_bytes import GgufBytes
from structprune.engine.planning.tensors import (
    BlockTensors,
    TensorForecast,
    cut_tensors,
    file_bytes,
    result_tensors,
)
from structprune.errors import InputError, UnsupportedError
from structprune.kinds import UNIT_KINDS, UnitKind
from structprune.recipe import ResolvedRecipe
from structprune.recipe.latency import NO_TABLE, LatencyLimit, LatencyTable
from structprune.recipe.limits import targets_of
from structprune.recipe.repaired import repair_adds_biases
from structprune.recipe.units import ResolvedUnits
from structprune.results.sizes import Counted, SizeReport
from structprune.solvers import SOLVERS
from structprune.types import BlockLayout, UnitGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class SublayerSizes:
    """What one sublayer adds to a quantity."""

    num_units: int
    units: Sizes
    module: int
    """What all of its module adds, parameters that belong to no unit too."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The run that is asked about."""

    stock: StockModel
    recipe: ResolvedRecipe
    kinds: Sequence[UnitKind]
    """Kinds whose units may go; none where whole blocks do."""

    @property
    def tokens(self) -> int:
        """Length of the sequence whose cache is limited; 0 where none is."""
        limit = targets_of(self.recipe).get("target_kv_cache")
        return limit.tokens if limit else 0

    @property
    def gguf_type(self) -> str:
        """The type of the GGUF file that bytes are limited of; empty where none is."""
        limit = targets_of(self.recipe).get("target_bytes")
        return limit.gguf_type if limit else ""

    @cached_property
    def gguf(self) -> GgufBytes:
        """What tensors take in that file."""
        return GgufBytes(self.stock, self.gguf_type, blocks_go=getattr(self.recipe, "allow_block_removal", False))

    @property
    def latency(self) -> LatencyLimit:
        """The limit of time."""
        return targets_of(self.recipe)["target_latency"]

    @property
    def table(self) -> LatencyTable:
        """The times that a limit of time is kept by. Raises InputError if there are none."""
        table: LatencyTable = getattr(self.recipe, "latency_table", NO_TABLE)
        if not table:
            raise InputError(
                "a limit of time is kept by a table of what each width takes",
                got=f"--target-latency {self.latency}",
                wanted="--latency-table FILE",
                do="make it on the machine that is meant: structprune bench MODEL --table FILE",
            )
        return table

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

    name: Callable[[Asked], str]
    """What is counted, in words."""
    total: Callable[[Asked, Sequence[BlockLayout]], int]
    """What a result of these blocks has, all of whose units are there."""
    sizes: Callable[[Asked, BlockLayout, UnitGroup], SublayerSizes]
    """What a sublayer, given by its first group, adds. Raises UnsupportedError where that is not known."""
    reached: Callable[[Asked, SizeReport], int | None]
    """What the written model has, from (that model under the run's recipe, size); None: it was not measured."""
    at_most: Callable[[Asked, Any], int] = lambda asked, value: int(value)
    """The most, from the value of the recipe's field."""
    counts: Counted = "bytes"


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


def block_cache_bytes(stock: StockModel, block: BlockLayout, tokens: int) -> int:
    """Count the bytes of a block's keys and values of one sequence."""
    if not block.has("attention"):
        return 0
    kept = _cached_tokens(stock, block.index, tokens)
    return _cache_numbers(stock, block.index) * kept * _cache_item(stock, block)


def _cache_bytes(stock: StockModel, blocks: Sequence[BlockLayout], tokens: int) -> int:
    """Count the bytes of keys and values of one sequence."""
    return sum(block_cache_bytes(stock, block, tokens) for block in blocks)


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


def _times(asked: Asked, block: BlockLayout, group: UnitGroup) -> tuple[tuple[int, int], ...]:
    """Return what a sublayer takes at each width that was timed, in nanoseconds."""
    return asked.table.times(group.kind, group.num_units).nanoseconds(asked.latency.phase)


def _latency_sizes(asked: Asked, block: BlockLayout, group: UnitGroup) -> SublayerSizes:
    """Read what a sublayer takes at every width from the table."""
    if asked.stock.head_units != "kv-group":
        raise UnsupportedError(
            "the table times attention of fewer KV heads",
            got=f"--target-latency, --head-units {asked.stock.head_units}",
            wanted="--head-units kv-group",
        )
    table = _times(asked, block, group)
    whole = table[-1][1]
    return SublayerSizes(
        num_units=group.num_units, units=Sizes(unit=max(1, whole // group.num_units), table=table), module=whole
    )


def _latency(asked: Asked, blocks: Sequence[BlockLayout]) -> int:
    """Return the time of a model of these blocks, in nanoseconds: the source's without the sublayers of the others."""
    left = {block.index for block in blocks}
    gone = (block for block in asked.stock.layout.blocks if block.index not in left)
    return asked.table.whole(asked.latency.phase) - sum(
        _times(asked, block, block.group(kind))[-1][1] for block in gone for kind in UNIT_KINDS if block.has(kind)
    )


def _longest(asked: Asked, limit: LatencyLimit) -> int:
    """Return the longest time, in nanoseconds."""
    return limit.nanoseconds or int(limit.share * asked.table.whole(limit.phase))


def _latency_name(asked: Asked) -> str:
    table = asked.table
    what = f"a prompt of {table.prompt_tokens:,} tokens" if asked.latency.phase == "prefill" else "a token"
    return f"time of {what} on {table.device}, {table.dtype}, {table.batch} at a time"


def unit_step(recipe: ResolvedUnits, group: UnitGroup) -> int:
    """Return what the kept units are a multiple of; channels in every process's share alike."""
    if group.kind == "mlp":
        return recipe.multiple_of * recipe.tensor_parallel
    if recipe.head_units == "value-channel":
        # Rows of v_proj; every KV head keeps as many.
        return math.lcm(recipe.multiple_of * recipe.tensor_parallel, group.partitions)
    if recipe.head_units == "kv-group":
        return recipe.tensor_parallel
    # A query head of every KV head: there are as many as KV heads, which the processes share already.
    return 1


_FILES = "bytes of the weight files"


def _file_total(asked: Asked, blocks: Sequence[BlockLayout]) -> int:
    """Count the bytes of the weight files of these blocks, or of the GGUF file."""
    if asked.gguf_type:
        biases = [shape for block in blocks for shape in asked.new_biases(block).values()]
        return asked.gguf.total(blocks, biases)
    return file_bytes(_whole_tensors(asked, blocks), asked.recipe.max_shard_size)


def _file_sizes(asked: Asked, block: BlockLayout, group: UnitGroup) -> SublayerSizes:
    """Count what a sublayer adds to them."""
    if not asked.gguf_type:
        return _stored_sizes(asked, block, group, lambda name: asked.item_bytes(block, name))
    blocks, names = asked.stock.layout.blocks, set(block.sublayer_tensors(group.kind))
    new = [(name, shape) for name, shape in asked.new_biases(block).items() if name.startswith(group.module_prefix)]

    def stored(keep: int) -> int:
        kept = {group.kind: [keep] * len(blocks)}
        shapes = [(name, shape) for name, _, shape in cut_tensors(block, kept) if name in names]
        return asked.gguf.tensors(block, [*shapes, *new], number=block.index, count=len(blocks))

    assert isinstance(asked.recipe, ResolvedUnits)
    step = unit_step(asked.recipe, group)
    widths = sorted({0, *range(step, group.num_units, step), group.num_units})
    table = tuple((keep, stored(keep) if keep else 0) for keep in widths)
    whole, num_units = table[-1][1], group.num_units
    unit = (whole - table[1][1]) // max(1, num_units - table[1][0])
    even = all(size == whole - (num_units - keep) * unit for keep, size in table[1:])
    sizes = Sizes(unit=unit, rest=whole - num_units * unit) if even else Sizes(unit=max(1, unit), table=table)
    return SublayerSizes(num_units=num_units, units=sizes, module=whole)


QUANTITIES: Mapping[str, Quantity] = {
    "target_parameters": Quantity(
        name=lambda asked: "parameters",
        counts="numbers",
        total=lambda asked, blocks: sum(math.prod(tensor.shape) for tensor in _whole_tensors(asked, blocks).values()),
        sizes=lambda asked, block, group: _stored_sizes(asked, block, group, lambda name: 1),
        reached=lambda written, size: size.parameters_after,
    ),
    "target_bytes": Quantity(
        name=lambda asked: f"bytes of a {asked.gguf_type.upper()} GGUF file" if asked.gguf_type else _FILES,
        at_most=lambda asked, value: value.at_most,
        total=_file_total,
        sizes=_file_sizes,
        reached=lambda written, size: None if written.gguf_type else size.bytes_after,
    ),
    "target_kv_cache": Quantity(
        name=lambda asked: f"bytes of the KV cache of {asked.tokens:,} tokens",
        at_most=lambda asked, value: value.at_most,
        total=lambda asked, blocks: _cache_bytes(asked.stock, blocks, asked.tokens),
        sizes=_cache_sizes,
        reached=lambda written, size: _cache_bytes(written.stock, written.stock.layout.blocks, written.tokens),
    ),
    "target_latency": Quantity(
        name=_latency_name,
        at_most=_longest,
        counts="nanoseconds",
        total=_latency,
        sizes=_latency_sizes,
        reached=lambda written, size: None,
    ),
}
"""Field of the recipe -> what it limits. Headers of files are counted as those of all units, which are no shorter."""
