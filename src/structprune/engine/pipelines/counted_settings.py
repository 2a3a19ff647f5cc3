"""How many whole blocks or experts go."""

from __future__ import annotations

import math


def num_to_remove(sparsity: float, total: int) -> int:
    """Count how many of `total` things, all alike, are at least the share `sparsity` of them."""
    # The epsilon keeps 0.3 * 10 from becoming 4 through binary rounding.
    return math.ceil(sparsity * total - 1e-9)
