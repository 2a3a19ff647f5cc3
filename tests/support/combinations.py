"""Combinations of parameters: every pair of values by default, all others as slow tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairs_of(row: Sequence[Any]) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    return {(first, second) for first, second in combinations(enumerate(row), 2)}


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Some of the product's rows, such that any two values of two axes are together in one of them."""
    rows = list(product(*axes))
    missing = set[Any]().union(*map(pairs_of, rows))
    found: list[tuple[Any, ...]] = []
    while missing:
        found.append(max(rows, key=lambda row: len(pairs_of(row) & missing)))
        missing -= pairs_of(found[-1])
    return found


def by_pairs(*axes: Sequence[Any]) -> list[Any]:
    """All rows of the product for `parametrize`; those beyond `covering` are slow."""
    quick = covering(*axes)
    return [pytest.param(*row, marks=() if row in quick else pytest.mark.slow) for row in product(*axes)]
