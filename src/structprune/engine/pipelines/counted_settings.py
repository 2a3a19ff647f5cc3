"""How many whole blocks or experts go."""

from __future__ import annotations

import math

from structprune.results.sizes import ReachableShares


def num_to_remove(sparsity: float, total: int) -> int:
    """Count how many of `total` things, all alike, are at least the share `sparsity` of them."""
    # The epsilon keeps 0.3 * 10 from becoming 4 through binary rounding.
    return math.ceil(sparsity * total - 1e-9)


def counted_shares(sparsity: float, total: int) -> ReachableShares:
    """Return what share of `total` things, all alike, goes, and the next smaller one."""
    remove = num_to_remove(sparsity, total)
    return ReachableShares(removed=remove / total, below=max(0, remove - 1) / total, above=remove / total)
