"""How many units each block keeps, and whether several processes can share what is left evenly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from structprune.allocation import ALLOCATORS, AllocationOptions, BlockBudget
from structprune.architectures.families.common import VALUES_ENTRY
from structprune.architectures.stock.model import StockModel
from structprune.errors import UnsupportedError
from structprune.recipe import Recipe
from structprune.recipe.units import ResolvedUnits
from structprune.types import BlockLayout, UnitGroup

Widths = dict[str, list[int]]
"""Kind -> units of each block; zero where the block has no such sublayer, or is to lose it."""


def choose_widths(
    stock: StockModel, recipe: ResolvedUnits, kinds: Sequence[str], costs: Mapping[str, Sequence[Tensor]] | None
) -> Widths:
    """Choose the units to keep per block, for each kind in scope; kinds share one budget if the allocator says so.

    An allocator that compares nothing needs no costs. Raises InputError if the sparsity cannot be reached,
    UnsupportedError if `tensor_parallel` processes could not share the result evenly.
    """
    blocks = stock.layout.blocks
    num_blocks = len(blocks)
    budgets = [
        BlockBudget(
            block=block.index,
            kind=group.kind,
            num_units=group.num_units,
            unit_parameters=sum(block.unit_parameters(part) for part in block.groups_of(kind)),
            module_parameters=block.module_parameters(group),
            multiple_of=_multiple(recipe, group),
            cost_U=None if costs is None else costs[group.kind][block.index],
        )
        for kind in kinds
        for block in blocks
        if block.has(kind)
        for group in (block.group(kind),)
    ]
    options = AllocationOptions(
        sparsity=recipe.sparsity,
        min_retention=recipe.min_retention,
        max_retention=recipe.max_retention,
        temperature=recipe.temperature,
        allow_removal=recipe.allow_block_removal,
        protected=frozenset(range(recipe.protect_first))
        | frozenset(range(num_blocks - recipe.protect_last, num_blocks)),
    )
    kept: Widths = {kind: [0] * num_blocks for kind in kinds}
    for budget, num_keep in zip(budgets, ALLOCATORS.get(recipe.allocator).allocate(budgets, options), strict=True):
        kept[budget.kind][budget.block] = num_keep
    check_shared_out(stock, recipe, kept)
    return kept


def check_shared_out(stock: StockModel, recipe: Recipe, kept: Mapping[str, Sequence[int]]) -> None:
    """Raise UnsupportedError, naming the block, if `tensor_parallel` does not divide what the blocks keep."""
    found = indivisible(stock, recipe.tensor_parallel, kept)
    if found is not None:
        raise UnsupportedError(
            f"{recipe.tensor_parallel} processes cannot share every block evenly",
            got=found,
            wanted=f"multiples of --tensor-parallel {recipe.tensor_parallel}",
            do="take a size that divides the heads and widths of the blocks, or prune what it does not divide too",
        )


def indivisible(stock: StockModel, processes: int, kept: Mapping[str, Sequence[int]]) -> str | None:
    """Find the first number of heads, KV heads or channels that `processes` does not divide, with its block, or None.

    Kinds that are not in `kept` keep what they have.
    """
    if processes == 1:
        return None
    for block in stock.layout.blocks:
        for name, size in _sizes(stock, block, kept).items():
            if size % processes:
                return f"block {block.index}: {name} {size}"
    return None


def _sizes(stock: StockModel, block: BlockLayout, kept: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return config entry -> number that the block will have. Removed sublayers have none."""
    sizes: dict[str, int] = {}
    # Units of query heads leave the KV heads as they are, and say nothing of them.
    for group in stock.family.groups(stock.block_configs[block.index], "kv-group"):
        if block.has(group.kind):
            sizes |= group.config_values(group.num_units) or {f"{group.kind} units": group.num_units}
    for group in block.groups:
        count = kept[group.kind][block.index] if group.kind in kept else group.num_units
        sizes |= group.config_values(count)
    # Processes share whole heads, whatever the width of their values.
    return {name: size for name, size in sizes.items() if size and name != VALUES_ENTRY}


def _multiple(recipe: ResolvedUnits, group: UnitGroup) -> int:
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
