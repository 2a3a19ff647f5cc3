"""What is known of one operation: how it ties axes together, and how it runs once they are shorter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from structprune.tracing.terms import Atom, Term, kept_positions
from structprune.tracing.values import Step, Value

Output = Value | tuple[Value, ...]


@dataclass(slots=True, kw_only=True)
class Call:
    """One operation about to run with fewer units: its target and arguments may be changed in place."""

    target: Any
    arguments: dict[str, Any]
    """Arguments by the names of the schema, tensors in place of nodes."""
    inputs: Mapping[str, Value]
    """Values of the arguments that are tensors; of a list of them, the last one."""
    output: Output
    kept: Mapping[Atom, Sequence[int]]

    def size(self, term: Term) -> int:
        """Count what is left of `term`."""
        return len(kept_positions(term, self.kept))

    def shape(self) -> list[int]:
        """Return the output's shape, one tensor."""
        assert isinstance(self.output, Value)
        return [self.size(dim) for dim in self.output.dims]

    def before(self, term: Term, position: int) -> int:
        """Count what is left of `term` before a position of the whole."""
        return sum(place < position for place in kept_positions(term, self.kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One entry of the table."""

    rule: Callable[[Step], Output]
    """Build the output's value from those of the inputs; unify, pin and couple on the way."""
    resize: Callable[[Call], None] | None = None
    """Rewrite sizes that are written in the arguments; None: there are none."""


def to_shape(call: Call) -> None:
    """Write the output's shape where the call has its sizes, whatever the argument is called."""
    name = next(name for name in ("size", "shape", "sizes") if name in call.arguments)
    call.arguments[name] = call.shape()
