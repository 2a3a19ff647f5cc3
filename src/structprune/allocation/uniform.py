"""The same share of every block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from structprune.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBudget:
    """One unit group of one block, as an allocator sees it: counts and costs, never a matrix."""

    block: int
    kind: str
    num_units: int
    unit_parameters: int
    module_parameters: int
    """Parameters of the module that holds the group; the sparsity's denominator."""


def uniform(budgets: Sequence[BlockBudget], sparsity: float, multiple_of: int) -> list[int]:
    """Units to keep per group: at least `sparsity` of each module's parameters goes.

    The kept width is rounded down to a multiple of `multiple_of`, unless nothing is to be removed. Raises
    InputError if a group would be left empty.
    """
    kept: list[int] = []
    for budget in budgets:
        # The epsilon keeps 0.3 * 1000 / 1 from becoming 301 units through binary rounding.
        remove = math.ceil(sparsity * budget.module_parameters / budget.unit_parameters - 1e-9)
        keep = budget.num_units - remove
        if remove > 0:
            keep -= keep % multiple_of
        if keep <= 0:
            raise InputError(
                f"no {budget.kind} units would be left",
                where=f"block {budget.block}",
                got=f"sparsity {sparsity:g} with multiples of {multiple_of}",
                wanted=f"at least one of {budget.num_units} units",
                do="lower --sparsity or --multiple-of",
            )
        kept.append(keep)
    return kept
