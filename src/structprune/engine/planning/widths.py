"""How many units each block keeps, and whether several processes can share what is left evenly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from structprune.allocation import ALLOCATORS, AllocationOptions, BlockBudget
from structprune.allocation.budget import Sizes, allowed_removals, check_bounds, largest_removal, removal_target
from structprune.allocation.menu import Budget, Slot, list_slots, make_menu
from structprune.architectures.families.common import VALUES_ENTRY
from structprune.architectures.stock.model import StockModel
from structprune.engine.planning.limits import Limit, check_within, find_limits
from structprune.engine.planning.quantities import SublayerSizes, unit_step
from structprune.errors import InputError, UnsupportedError
from structprune.recipe import Recipe
from structprune.recipe.path import SublayerPath
from structprune.recipe.units import ResolvedUnits
from structprune.recipe.widths import BlockWidths
from structprune.results.sizes import ReachableShares
from structprune.types import UNIT_KINDS, BlockLayout, UnitGroup, UnitKind

# Halvings of the range of shares, finer than any unit.
_SEARCH_STEPS = 40
# Sums of removals that are looked at, in units of what all have in common: one bit each.
_MOST_SUMS = 2**23

Widths = dict[str, list[int]]
"""Kind -> units of each block; zero where the block has no such sublayer, or is to lose it."""


def choose_widths(
    stock: StockModel, recipe: ResolvedUnits, kinds: Sequence[UnitKind], costs: Mapping[str, Sequence[Tensor]] | None
) -> Widths:
    """Choose the units to keep per block, for each kind in scope; kinds share one budget if the allocator says so.

    An allocator that compares nothing needs no costs. Raises InputError if the sparsity cannot be reached,
    UnsupportedError if `tensor_parallel` processes could not share the result evenly.
    """
    limits = binding_limits(stock, recipe, kinds)
    budgets, options = _budgets(stock, recipe, kinds, costs, limits), _options(stock, recipe, limits)
    allocator = ALLOCATORS.get(recipe.allocator)
    kept: Widths = {kind: [0] * len(stock.layout.blocks) for kind in kinds}
    for budget in budgets:
        # What adds nothing to the sum that is limited loses nothing, unless it may not keep everything.
        least = allowed_removals(budget, options)[0] if allocator.bounded else 0
        kept[budget.kind][budget.block] = budget.num_units - least
    counted = [budget for budget in budgets if any(sizes.unit for sizes in budget.sizes)]
    for budget, num_keep in zip(counted, allocator.allocate(counted, options), strict=True):
        kept[budget.kind][budget.block] = num_keep
    check_shared_out(stock, recipe, kept)
    return kept


def search_menu(
    stock: StockModel, recipe: ResolvedUnits, kinds: Sequence[UnitKind], costs: Mapping[str, Sequence[Tensor]]
) -> tuple[list[Slot], Budget]:
    """List the widths that a search may choose from, and what they may add to what is limited.

    Sublayers that add nothing to it are none of them. Raises InputError if the limits cannot be reached.
    """
    limits = binding_limits(stock, recipe, kinds)
    budgets = _budgets(stock, recipe, kinds, costs, limits)
    counted = [budget for budget in budgets if any(sizes.unit for sizes in budget.sizes)]
    return make_menu(counted, _options(stock, recipe, limits))


def binding_limits(stock: StockModel, recipe: ResolvedUnits, kinds: Sequence[UnitKind]) -> list[Limit]:
    """Return the limits that take something, of those that the recipe asks for; none where a share decides.

    Raises InputError for one that the groups' bounds do not allow.
    """
    limits = [limit for limit in find_limits(stock, recipe, kinds) if limit.removal > 0]
    bounded = ALLOCATORS.get(recipe.allocator).bounded
    for limit in limits:
        budgets, options = _budgets(stock, recipe, kinds, None, [limit]), _options(stock, recipe, [limit])
        least = (b.num_units - allowed_removals(b, options)[-1] if bounded else 0 for b in budgets)
        check_within(
            limit, sum(b.sizes[0].kept(b.num_units) - b.sizes[0].kept(n) for b, n in zip(budgets, least, strict=True))
        )
    return limits


def most_removed(stock: StockModel, recipe: ResolvedUnits, kinds: Sequence[UnitKind]) -> int:
    """Count the parameters that go where every sublayer loses as many units as it may."""
    options = _options(stock, recipe, [])
    return sum(
        largest_removal(budget, options) * budget.unit_size for budget in _budgets(stock, recipe, kinds, None, [])
    )


def priced_sublayers(
    stock: StockModel, recipe: ResolvedUnits, kinds: Sequence[UnitKind], costs: Mapping[str, Sequence[Tensor]]
) -> tuple[list[BlockBudget], AllocationOptions]:
    """List the sublayers in scope with what their removals cost, and what all of them have to meet."""
    limits = binding_limits(stock, recipe, kinds)
    return _budgets(stock, recipe, kinds, costs, limits), _options(stock, recipe, limits)


def removal_path(
    stock: StockModel, recipe: ResolvedUnits, kinds: Sequence[UnitKind], costs: Mapping[str, Sequence[Tensor]]
) -> tuple[SublayerPath, ...]:
    """List the widths that every sublayer may have, in parameters, with what their removals are predicted to cost."""
    budgets = _budgets(stock, recipe, kinds, costs, [])
    return tuple(
        SublayerPath(
            block=slot.block,
            kind=slot.kind,
            before=budget.sizes[0].kept(budget.num_units),
            units=tuple(variant.keep for variant in slot.variants),
            parameters=tuple(variant.cost[0] for variant in slot.variants),
            loss=tuple(variant.price for variant in slot.variants),
        )
        for budget, slot in zip(budgets, list_slots(budgets, _options(stock, recipe, [])), strict=True)
    )


def reachable_shares(
    stock: StockModel, recipe: ResolvedUnits, kinds: Sequence[UnitKind], kept: Mapping[str, Sequence[int]] | None
) -> ReachableShares | None:
    """Find the shares nearest to the one that is asked for.

    `kept` are the widths of the run; before they are known, the most that may go stands for what goes. Returns None
    where no units are in scope, where the widths were decided outside or by limits of something else than parameters,
    and where the sizes of removals have so little in common that there are too many sums of them.
    """
    limits = binding_limits(stock, recipe, kinds)
    if not kinds or recipe.widths.blocks or any(limit.field != "target_parameters" for limit in limits):
        return None
    budgets, options = _budgets(stock, recipe, kinds, None, limits), _options(stock, recipe, limits)
    allocator = ALLOCATORS.get(recipe.allocator)
    if allocator.compares == "none" and not recipe.searches:
        return _even_shares(budgets, options, allocator.allocate)
    if kept is None:
        return _possible_shares(budgets, options)
    total, target = sum(budget.module_size for budget in budgets), removal_target(budgets, options)
    steps = [budget.multiple_of * budget.unit_size for budget in budgets]
    gone = [budget.num_units - kept[budget.kind][budget.block] for budget in budgets]
    # With the last unit goes more than the units.
    removed = sum(removed_parameters(b, group, kept[group.kind][b.index]) for b, group in sublayers(stock, kinds))
    # One step fewer somewhere: of those that miss the target the one that misses it least.
    back = [step for step, units in zip(steps, gone, strict=True) if units and removed - step < target]
    below = max(0, removed - min(back, default=removed)) / total if target else 0.0
    return ReachableShares(removed=removed / total, below=below, above=removed / total)


def _possible_shares(budgets: Sequence[BlockBudget], options: AllocationOptions) -> ReachableShares | None:
    """Find which sums of removals the groups allow, whatever the costs say.

    An allocator ends less than one step of one group behind the target (`round_to_budget`). Raises InputError if
    the groups allow none that would do.
    """
    check_bounds(budgets, options)
    _check_attention_stays(budgets, options)
    total, target = sum(budget.module_size for budget in budgets), removal_target(budgets, options)
    # In parameters: what must go, and of each group the first step beyond that and those after it, which are equal.
    least, steps = 0, list[tuple[int, int, int]]()
    for budget in budgets:
        allowed, size = allowed_removals(budget, options), budget.unit_size
        least += allowed[0] * size
        if len(allowed) > 1:
            steps.append(((allowed[1] - allowed[0]) * size, budget.multiple_of * size, len(allowed) - 2))
    if least >= target:
        return ReachableShares(removed=least / total, below=0.0, above=least / total)
    unit = math.gcd(*(size for first, further, _ in steps for size in (first, further)))
    largest = max(max(first, further) for first, further, _ in steps)
    num_sums = (target - 1 + largest - least) // unit + 1
    if num_sums > _MOST_SUMS:
        return None
    # Bit i: `least` and i units more can go.
    sums, all_sums = 1, (1 << num_sums) - 1
    for first, further, count in steps:
        longer = sums << first // unit
        taken = 1
        while count > 0:
            taken = min(taken, count)
            longer |= longer << further // unit * taken & all_sums
            count, taken = count - taken, 2 * taken
        sums = (sums | longer) & all_sums
    wanted = -(-(target - least) // unit)
    low = (sums & (1 << wanted) - 1).bit_length() - 1
    high = sums >> wanted
    above = wanted + (high & -high).bit_length() - 1
    found = [(least + unit * place) / total for place in (sums.bit_length() - 1, low, above)]
    return ReachableShares(removed=found[0], below=found[1], above=found[2], decided=found[0] == found[2])


def _check_attention_stays(budgets: Sequence[BlockBudget], options: AllocationOptions) -> None:
    """Raise InputError if so much is to go that the attention of every block would, which no run may do."""
    attention = [budget for budget in budgets if budget.kind == "attention"]
    if not options.allow_removal or not attention or any(b.block in options.protected for b in attention):
        return
    total, target = sum(b.module_size for b in budgets), removal_target(budgets, options)
    most = sum(largest_removal(b, options) * b.unit_size for b in budgets)
    # One step of one of them has to stay.
    most -= min(b.multiple_of * b.unit_size for b in attention)
    if most < target:
        raise InputError(
            "the sparsity would take the attention of every block",
            got=f"sparsity {options.sparsity:g}",
            wanted=f"at most {most / total:.4f}, with some attention left in one block",
            do="lower --sparsity, or protect a block from pruning",
        )


def _even_shares(
    budgets: Sequence[BlockBudget], options: AllocationOptions, allocate: Callable[..., list[int]]
) -> ReachableShares:
    """Search what an allocator that compares nothing removes for other shares: more for a larger one, in steps."""
    total = sum(budget.module_size for budget in budgets)

    def removed(asked: float) -> float:
        kept = allocate(budgets, replace(options, sparsity=asked, removal=None))
        units = sum(b.unit_size * (b.num_units - count) for b, count in zip(budgets, kept, strict=True))
        return units / total

    found, asked = removed(options.sparsity), options.sparsity
    below, above, low, high = 0.0, found, 0.0, asked
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        value = removed(middle)
        # A share that is met exactly must not fail by rounding.
        if value >= asked * (1 - 1e-12):
            above, high = value, middle
        else:
            below, low = value, middle
    return ReachableShares(removed=found, below=below, above=above)


def _budgets(
    stock: StockModel,
    recipe: ResolvedUnits,
    kinds: Sequence[UnitKind],
    costs: Mapping[str, Sequence[Tensor]] | None,
    limits: Sequence[Limit],
) -> list[BlockBudget]:
    """List the unit groups that what is to go is shared out to, with what they add to the limited sums."""
    found: list[BlockBudget] = []
    for block, group in sublayers(stock, kinds):
        sizes = [limit.sizes[block.index, group.kind] for limit in limits] or [_parameter_sizes(block, group)]
        found.append(
            BlockBudget(
                block=block.index,
                kind=group.kind,
                num_units=group.num_units,
                unit_size=sizes[0].units.unit,
                module_size=sizes[0].module,
                rest_size=sizes[0].units.rest,
                size_table=sizes[0].units.table,
                further=tuple(size.units for size in sizes[1:]),
                multiple_of=unit_step(recipe, group),
                cost_U=None if costs is None else costs[group.kind][block.index],
            )
        )
    return found


def _parameter_sizes(block: BlockLayout, group: UnitGroup) -> SublayerSizes:
    """Count the parameters that a share of the scope is a share of."""
    unit = sum(block.unit_parameters(part) for part in block.groups_of(group.kind))
    return SublayerSizes(
        num_units=group.num_units,
        units=Sizes(unit=unit, rest=block.sublayer_parameters(group.kind) - group.num_units * unit),
        module=block.module_parameters(group),
    )


def _options(stock: StockModel, recipe: ResolvedUnits, limits: Sequence[Limit]) -> AllocationOptions:
    num_blocks = len(stock.layout.blocks)
    return AllocationOptions(
        sparsity=recipe.sparsity,
        removal=limits[0].removal if limits else None,
        further=tuple(limit.removal for limit in limits[1:]),
        min_retention=recipe.min_retention,
        max_retention=recipe.max_retention,
        temperature=recipe.temperature,
        allow_removal=recipe.allow_block_removal,
        protected=frozenset(range(recipe.protect_first))
        | frozenset(range(num_blocks - recipe.protect_last, num_blocks)),
        widths=recipe.widths.blocks,
    )


def share_removed(stock: StockModel, kinds: Sequence[UnitKind], widths: BlockWidths) -> float:
    """Compute the share of the parameters of `kinds` that goes where `widths` are kept.

    Raises InputError for a block or a kind that is not in scope, and for more units than there are.
    """
    blocks = stock.layout.blocks
    for number, named in widths.blocks.items():
        if number >= len(blocks):
            raise InputError(
                "--widths names a block that the model does not have",
                got=f"block {number}",
                wanted=f"blocks 0 to {len(blocks) - 1}",
            )
        for kind in named:
            if kind not in kinds:
                raise InputError(
                    f"--widths names {kind}, which is not in scope", where=f"block {number}", do="use --scope all"
                )
            if not blocks[number].has(kind):
                raise InputError(f"--widths names {kind}, which the block has lost", where=f"block {number}")
    removed, total = 0, 0
    for block, group in sublayers(stock, kinds):
        total += block.module_parameters(group)
        keep = widths.kept(block.index, group.kind, group.num_units)
        if keep > group.num_units:
            raise InputError(
                "--widths asks for more units than there are",
                where=f"block {block.index}, {group.kind}",
                got=str(keep),
                wanted=f"at most {group.num_units}",
                do="write the widths for this model and its --head-units",
            )
        removed += removed_parameters(block, group, keep)
    if removed >= total:
        raise InputError("--widths leaves nothing of the scope", wanted="at least one sublayer with units")
    return removed / total


def block_widths(stock: StockModel, kept: Mapping[str, Sequence[int]]) -> BlockWidths:
    """Put kind -> units of each block into the form that is saved, block by block; without any, all units are kept."""
    blocks: dict[int, dict[UnitKind, int]] = {block.index: {} for block in stock.layout.blocks}
    for block, group in sublayers(stock, [kind for kind in UNIT_KINDS if kind in kept or not kept]):
        blocks[block.index][group.kind] = kept[group.kind][block.index] if kept else group.num_units
    attention = any("attention" in kinds for kinds in blocks.values())
    return BlockWidths(blocks=blocks, head_units=stock.head_units if attention else None)


def are_even(stock: StockModel, kinds: Sequence[UnitKind], widths: BlockWidths) -> bool:
    """Whether blocks that read the same config entries keep as many units, and some: one config can say it."""
    kept = {(*group.config_fields, group.kind): set[int]() for _, group in sublayers(stock, kinds)}
    for block, group in sublayers(stock, kinds):
        kept[*group.config_fields, group.kind].add(widths.kept(block.index, group.kind, group.num_units))
    return all(len(counts) == 1 and 0 not in counts for counts in kept.values())


def sublayers(stock: StockModel, kinds: Sequence[UnitKind]) -> list[tuple[BlockLayout, UnitGroup]]:
    """List the sublayers in scope, kind by kind; one group stands for all experts of a mixture."""
    return [(block, block.group(kind)) for kind in kinds for block in stock.layout.blocks if block.has(kind)]


def removed_parameters(block: BlockLayout, group: UnitGroup, keep: int) -> int:
    """Count the parameters that leave a sublayer which keeps so many units; with the last one goes its norm too."""
    if keep == 0:
        return block.sublayer_parameters(group.kind)
    return (group.num_units - keep) * sum(block.unit_parameters(part) for part in block.groups_of(group.kind))


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
    for group in stock.family.at(block.index).groups(stock.block_configs[block.index], "kv-group"):
        if block.has(group.kind):
            sizes |= group.config_values(group.num_units) or {f"{group.kind} units": group.num_units}
    for group in block.groups:
        count = kept[group.kind][block.index] if group.kind in kept else group.num_units
        sizes |= group.config_values(count)
    # Processes share whole heads, whatever the width of their values.
    return {name: size for name, size in sizes.items() if size and name != VALUES_ENTRY}
