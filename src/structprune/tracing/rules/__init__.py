"""The table of operations: how each one ties axes together, and how it runs once they are shorter.

A new operation is one value in one of the tables. Read first: `operation.py`, what an entry is; then `shapes.py`.
"""

from __future__ import annotations

from structprune.tracing.rules.channels import CHANNELS
from structprune.tracing.rules.elementwise import ELEMENTWISE
from structprune.tracing.rules.operation import Operation
from structprune.tracing.rules.products import PRODUCTS
from structprune.tracing.rules.reductions import REDUCTIONS
from structprune.tracing.rules.shapes import SHAPES

OPERATIONS: dict[str, Operation] = {**ELEMENTWISE, **SHAPES, **PRODUCTS, **REDUCTIONS, **CHANNELS}
"""Name of an ATen operation, without its overload -> its entry."""


def operation(name: str) -> Operation | None:
    """Return the entry of an operation; one in place (`add_`) has that of `add`. None: it is unknown."""
    return OPERATIONS.get(name) or OPERATIONS.get(name.removesuffix("_"))
