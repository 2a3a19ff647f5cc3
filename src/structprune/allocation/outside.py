"""The widths that a person, a search or another tool has decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from structprune.allocation.allocator import Allocator
from structprune.allocation.budget import AllocationOptions, BlockBudget
from structprune.errors import InputError
from structprune.kinds import UnitKind


def read_out(budgets: Sequence[BlockBudget], options: AllocationOptions) -> list[int]:
    """Return `options.widths` of each group, all units where it names none.

    The other options have no part. Raises InputError, naming the block, for a number that the group cannot keep.
    """
    return [_checked(budget, options.widths.get(budget.block, {})) for budget in budgets]


def _checked(budget: BlockBudget, kinds: Mapping[UnitKind, int]) -> int:
    keep = kinds.get(budget.kind, budget.num_units)
    if keep % budget.multiple_of and keep != budget.num_units:
        below = keep // budget.multiple_of * budget.multiple_of
        raise InputError(
            f"--widths has a number that is no multiple of {budget.multiple_of}",
            where=f"block {budget.block}, {budget.kind}",
            got=str(keep),
            wanted=f"{below} or {below + budget.multiple_of}",
            do="change the file, or --multiple-of and --tensor-parallel where they ask for it",
        )
    return keep


WIDTHS = Allocator(allocate=read_out, compares="none", bounded=False, reads_widths=True)
