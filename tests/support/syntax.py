"""Syntax trees of the source, for the tests that hold its rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements at and below a node. `ast.walk` comes by every name and operator, which takes seconds."""
    yield node
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        parts = getattr(node, field, ())
        for part in parts if isinstance(parts, list) else ():
            yield from statements(part)
