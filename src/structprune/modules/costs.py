"""What a module costs with fewer units: parameters, and multiplications of its graph for one example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch.fx import Node

from structprune.modules.layout import ModuleLayout
from structprune.registry import Registry
from structprune.tracing.terms import Atom, Product, Sum, Term, resolve
from structprune.tracing.values import Value, arguments_of, operation_name

Counts = Mapping[Atom, int]
"""Atom -> how many of its things stay."""
Amount = tuple[Term, ...]
"""Axes whose sizes are multiplied."""


def size_of(term: Term, counts: Counts) -> int:
    """Count what is left of an axis."""
    term = resolve(term)
    if isinstance(term, Atom):
        return counts.get(term, term.size)
    if isinstance(term, Product):
        return prod(size_of(factor, counts) for factor in term.factors)
    assert isinstance(term, Sum)
    return sum(size_of(part, counts) for part in term.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A count that follows from how many units stay."""

    name: str
    amounts: Callable[[ModuleLayout], list[Amount]]

    def of(self, layout: ModuleLayout) -> Callable[[Counts], int]:
        """Return the function that counts for a module: what it has, is read once."""
        amounts = self.amounts(layout)

        def count(counts: Counts) -> int:
            sizes: dict[int, int] = {}
            for amount in amounts:
                for term in amount:
                    if id(term) not in sizes:
                        sizes[id(term)] = size_of(term, counts)
            return sum(prod(sizes[id(term)] for term in amount) for amount in amounts)

        return count


def _parameters(layout: ModuleLayout) -> list[Amount]:
    """List the parameters, each once: two names of one tensor have the very same axes."""
    dims = {id(terms): terms for name, terms in layout.traced.parameters.items() if name in layout.parameters}
    return list(dims.values())


def _macs(layout: ModuleLayout) -> list[Amount]:
    """List the products of numbers in linear maps, convolutions and attention."""
    values = layout.traced.values
    summed: dict[Node, list[Term]] = {}
    for each in layout.traced.notes.contractions:
        summed.setdefault(each.node, []).append(each.term)
    found: list[Amount] = []
    for node, value in values.items():
        count = _COUNTS.get(operation_name(node)) if node.op == "call_function" else None
        if count is not None:
            inputs = {
                name: given
                for name, each in arguments_of(node).items()
                if isinstance(each, Node) and isinstance(given := values.get(each), Value)
            }
            found += count(value, inputs)
        elif node in summed and isinstance(value, Value):
            found.append((*value.dims, *summed[node]))
    return found


def _convolution(value: Value | tuple[Value, ...], inputs: Mapping[str, Value]) -> Sequence[Amount]:
    assert isinstance(value, Value)
    return [(*value.dims, *inputs["weight"].dims[1:])]


def _transposed(_: Value | tuple[Value, ...], inputs: Mapping[str, Value]) -> Sequence[Amount]:
    return [(*inputs["input"].dims, *inputs["weight"].dims[1:])]


def _attention(_: Value | tuple[Value, ...], inputs: Mapping[str, Value]) -> Sequence[Amount]:
    scores = (*inputs["query"].dims[:-1], inputs["key"].dims[-2])
    return [(*scores, inputs["query"].dims[-1]), (*scores, inputs["value"].dims[-1])]


_COUNTS: Mapping[str, Callable[[Value | tuple[Value, ...], Mapping[str, Value]], Sequence[Amount]]] = {
    **{f"conv{count}d": _convolution for count in (1, 2, 3)},
    **{f"conv_transpose{count}d": _transposed for count in (1, 2, 3)},
    "scaled_dot_product_attention": _attention,
}
"""Operations whose multiplications are more than outputs times what is summed over."""

PARAMETERS = Cost(name="parameters", amounts=_parameters)
MACS = Cost(name="macs", amounts=_macs)
COSTS: Registry[Cost] = Registry(
    "cost",
    Cost,
    {"parameters": "structprune.modules.costs:PARAMETERS", "macs": "structprune.modules.costs:MACS"},
)
