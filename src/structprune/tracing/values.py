"""What is known of one tensor of a graph, and of the operation that is being read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from structprune.tracing.terms import Atom, Term, couple, cut, leaves, pin, pinned, split, unify


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One tensor: the expressions of its axes, and what follows for removed units."""

    dims: tuple[Term, ...]
    silent: frozenset[Atom] = frozenset()
    """Atoms whose things are zero here once all parameters are zero along them: to remove them is to mask them."""
    chosen: Term | None = None
    """Term whose things the elements number: experts that a router has chosen."""
    origin: str | None = None
    """Parameter or buffer of which this is a view, or a choice along its first axis."""
    constant: tuple[int, ...] | None = None
    """Elements of a short list of whole numbers that is written in the code."""

    def is_silent(self, *terms: Term) -> bool:
        """Whether every removed unit along `terms` is zero here."""
        return leaves(*terms).keys() <= leaves(*self.silent).keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contraction:
    """A product that sums over a term: a linear map where one operand is a parameter."""

    node: Node
    term: Term
    origins: tuple[str, ...]
    """Parameters among the operands, without the bias."""
    bias: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """An operation in which the things of one axis see each other."""

    node: Node
    over: Term
    """Axis along which things see each other; positions, or the experts of a router."""
    heads: tuple[Term, ...] | None
    """The other axes of scores, besides that of the readers; None where it is no softmax."""


@dataclass(slots=True)
class Notes:
    """What the rules leave beside the values of their operations."""

    contractions: list[Contraction] = field(default_factory=list[Contraction])
    mixings: list[Mixing] = field(default_factory=list[Mixing])
    unknown: dict[str, str] = field(default_factory=dict[str, str])
    """Where an operation has no rule, or a form that its rule does not read -> its name."""


class Step:
    """One operation of a graph: its arguments by their names in the schema, and the values of its inputs."""

    def __init__(self, node: Node, environment: dict[Node, Any], notes: Notes) -> None:
        self.node = node
        self.notes = notes
        self._environment = environment
        self.arguments = arguments_of(node)
        self.name = operation_name(node)
        self.place = f"{self.name} ({node.name})"
        """How reasons name this operation."""

    def value(self, name: str) -> Value | None:
        """Return the value of the tensor argument `name`, None where it is no tensor."""
        found = self._of(self.arguments.get(name))
        return found if isinstance(found, Value) else None

    def tensor(self, name: str) -> Value:
        """Return the value of an argument that is a tensor."""
        found = self.value(name)
        assert found is not None, f"{self.place}: {name} is no tensor"
        return found

    def tensors(self, name: str) -> list[Value]:
        """Return the values of a list of tensors."""
        return [found for each in self.arguments[name] if isinstance(found := self._of(each), Value)]

    def inputs(self) -> list[Value]:
        """Return the values of all tensors that go in, those in lists too."""
        found: list[Value] = []
        for node in self.node.all_input_nodes:
            value = self._of(node)
            found += [each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Value)]
        return found

    def _of(self, argument: Any) -> Any:
        return self._environment.get(argument) if isinstance(argument, Node) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output, one tensor."""
        return tuple(self.node.meta["val"].shape)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the outputs, several tensors."""
        return [tuple(each.shape) for each in self.node.meta["val"]]

    def axis(self, rank: int, name: str = "dim", default: int | None = None) -> int:
        """Return the axis that an argument names, counted from the front."""
        given = self.arguments.get(name, default)
        assert isinstance(given, int)
        return given % rank

    def axes(self, rank: int, name: str = "dim") -> list[int]:
        """Return the axes that an argument names, counted from the front; all where it names none."""
        given = self.arguments.get(name)
        if given is None or given == []:
            return list(range(rank))
        return [each % rank for each in (given if isinstance(given, list | tuple) else [given])]

    def unify(self, first: Term, second: Term) -> None:
        """Make both terms the same, or pin both for this operation."""
        unify(first, second, self.place)

    def split(self, term: Term, left: int) -> tuple[Term, Term]:
        """Express `term` as a product with a left factor of this size."""
        return split(term, left, self.place)

    def cut(self, term: Term, position: int) -> tuple[Term, Term]:
        """Express `term` as a sum whose first segment has this size."""
        return cut(term, position, self.place)

    def pin(self, *terms: Term) -> None:
        """Hold every atom of `terms` as it is, for this operation."""
        pin(self.place, *terms)

    def couple(self, *terms: Term) -> None:
        """Note that this operation sees all things of `terms` together."""
        couple(self.place, *terms)

    def pinned(self, size: int) -> Atom:
        """Build an atom that cannot shrink, for this operation."""
        return pinned(size, self.place)

    def fresh(self) -> Value | tuple[Value, ...]:
        """Build outputs of which nothing is known: every axis is pinned."""
        result = self.node.meta.get("val")
        if isinstance(result, torch.Tensor):
            return Value(dims=tuple(self.pinned(size) for size in result.shape))
        return tuple(Value(dims=tuple(self.pinned(size) for size in shape)) for shape in self.shapes)

    def freeze(self) -> Value | tuple[Value, ...]:
        """Pin all that goes in, note the operation, and return outputs of which nothing is known."""
        self.notes.unknown[self.place] = self.name
        self.pin(*(dim for value in self.inputs() for dim in value.dims))
        return self.fresh()

    def broadcast(self, shapes: Iterable[Sequence[Term]]) -> tuple[Term, ...]:
        """Unify axes that lie above each other, counted from the back; axes of size 1 fit any other."""
        columns: list[list[Term]] = []
        for dims in shapes:
            for place, dim in enumerate(reversed(dims)):
                if place == len(columns):
                    columns.append([])
                columns[place].append(dim)
        return tuple(self._merge(column) for column in reversed(columns))

    def _merge(self, column: Sequence[Term]) -> Term:
        wide = [dim for dim in column if dim.size != 1]
        for other in wide[1:]:
            self.unify(wide[0], other)
        return wide[0] if wide else column[0]

    def contract(self, term: Term, operands: Sequence[Value], bias: Value | None = None) -> None:
        """Note a sum of products over `term`, which no longer sees units that are zero in one of the factors."""
        silent = silent_in_any(operands)
        self.couple(*(atom for atom in leaves(term) if atom not in silent))
        origins = tuple(value.origin for value in operands if value.origin is not None)
        named = bias.origin if bias is not None else None
        self.notes.contractions.append(Contraction(node=self.node, term=term, origins=origins, bias=named))


def silent_in_all(values: Iterable[Value]) -> frozenset[Atom]:
    """Return the atoms that are silent in every value: those of a sum of them."""
    sets = [leaves(*value.silent).keys() for value in values]
    return frozenset(set[Atom](sets[0]).intersection(*sets[1:])) if sets else frozenset()


def silent_in_any(values: Iterable[Value]) -> frozenset[Atom]:
    """Return the atoms that are silent in some value: those of a product of them."""
    return frozenset(leaves(*(atom for value in values for atom in value.silent)))


def silent_without(value: Value, *terms: Term) -> frozenset[Atom]:
    """Return the silent atoms of `value` that are not in `terms`."""
    return frozenset(leaves(*value.silent).keys() - leaves(*terms).keys())


def operation_name(node: Node) -> str:
    """Return the name of a node's operation without its overload: `linear`, `view`, `getitem`."""
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet if packet is not None else node.target, "__name__", str(node.target))


def arguments_of(node: Node) -> dict[str, Any]:
    """Return the arguments of a node by name, with the defaults of the schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**dict(enumerate(node.args)), **node.kwargs}  # pyright: ignore[reportReturnType]
    found: dict[str, Any] = {}
    for place, argument in enumerate(schema.arguments):
        if place < len(node.args):
            found[argument.name] = node.args[place]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value
    return found
