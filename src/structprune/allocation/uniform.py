"""The same share of the units of every block."""

from __future__ import annotations

import math
from collections.abc import Sequence

from structprune.allocation.allocator import Allocator
from structprune.allocation.budget import AllocationOptions, BlockBudget, asked_removal
from structprune.errors import InputError


def uniform(budgets: Sequence[BlockBudget], options: AllocationOptions) -> list[int]:
    """Remove the same share of every group, at least `sparsity` of the modules' parameters; return the units to keep.

    The share is that of the parameters that belong to units: where a module has others too, such as query and key maps
    beside value channels, all groups lose so much more (FASP, arXiv 2501.09412: s over one less the share of the rest).
    The kept width is rounded down to a multiple of `multiple_of`, unless nothing is to be removed. Protected blocks
    lose nothing, the others so much more; `min_retention` and `allow_removal` have no part: the share is the same by
    intent. Raises InputError if a group would be left empty.
    """
    free = sum(b.num_units * b.unit_size for b in budgets if b.block not in options.protected)
    share = asked_removal(budgets, options) / free if free else 0.0
    kept: list[int] = []
    for budget in budgets:
        # The epsilon keeps 0.3 * 1000 / 1 from becoming 301 units through binary rounding.
        remove = math.ceil(share * budget.num_units - 1e-9)
        keep = budget.num_units - remove
        if remove > 0:
            keep -= keep % budget.multiple_of
        if budget.block in options.protected:
            keep = budget.num_units
        if keep <= 0:
            raise InputError(
                f"no {budget.kind} units would be left",
                where=f"block {budget.block}",
                got=f"sparsity {options.sparsity:g}: {share:.4g} of the units, in multiples of {budget.multiple_of}",
                wanted=f"at least one of {budget.num_units} units",
                do="lower --sparsity or --multiple-of",
            )
        kept.append(keep)
    return kept


UNIFORM = Allocator(allocate=uniform, compares="none", even=True, bounded=False)
