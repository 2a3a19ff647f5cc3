"""Families: what shrinks together, as slices of named tensors.

A family is an atom that nothing holds. One of its things is a removable unit; where the atom stands in the expression
of an axis says which indices the unit owns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from structprune.tracing.terms import Atom, Product, Sum, Term, leaves, resolve
from structprune.types import AxisSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Units of one sort and every axis of a parameter or buffer that shrinks with them."""

    atom: Atom
    members: tuple[AxisSlice, ...]
    reading: frozenset[tuple[str, int]]
    """(tensor, axis) of the members that a product sums over: these read the units, the others compute them."""

    @property
    def num_units(self) -> int:
        return self.atom.size

    @property
    def consumers(self) -> tuple[AxisSlice, ...]:
        return tuple(member for member in self.members if (member.tensor, member.axis) in self.reading)

    @property
    def producers(self) -> tuple[AxisSlice, ...]:
        return tuple(member for member in self.members if (member.tensor, member.axis) not in self.reading)

    @property
    def couplings(self) -> tuple[str, ...]:
        """Operations that see all units at once, for which to remove is not to mask."""
        return tuple(self.atom.couplings)

    @property
    def is_exact(self) -> bool:
        """Whether the block without some units computes what it computes with zeros in their place."""
        return not self.atom.couplings


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenAxis:
    """An axis of a parameter, or a part of it, that cannot shrink."""

    tensor: str
    axis: int
    size: int
    """Size of the part that cannot: that of the axis, of one head, of one factor."""
    reasons: tuple[str, ...]
    """Operations that hold it, or inputs and outputs of the module, the first one first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an atom stands in an expression: unit u owns `width` indices from `offset + u * width`, several times."""

    units: int
    """Size of the atom."""
    offset: int = 0
    width: int = 1
    siblings: tuple[tuple[Term, int], ...] = ()
    """Factors to the left, the outermost first, each with its stride: every thing of it repeats the indices."""

    def inside(self, offset: int, right: int, siblings: tuple[tuple[Term, int], ...] = ()) -> Place:
        """Return the place in a larger expression, with `right` things for each here and others before and beside."""
        inner = tuple((sibling, stride * right) for sibling, stride in self.siblings)
        return Place(
            units=self.units,
            offset=offset + self.offset * right,
            width=self.width * right,
            siblings=(*siblings, *inner),
        )

    def stands_under(self, parent: Atom) -> bool:
        """Whether `parent` is a factor to the left."""
        return any(sibling is parent for sibling, _ in self.siblings)


def places(term: Term, atom: Atom) -> list[Place]:
    """Find every place of `atom` in `term`. An atom that is squared there has no places that a slice can say."""
    term = resolve(term)
    if term is atom:
        return [Place(units=atom.size)]
    found = list[Place]()
    if isinstance(term, Sum):
        start = 0
        for part in term.parts:
            found += [place.inside(start, 1) for place in places(part, atom)]
            start += part.size
    if isinstance(term, Product):
        strides = [Product(term.factors[number + 1 :]).size for number in range(len(term.factors))]
        for number, factor in enumerate(term.factors):
            left = tuple(zip(term.factors[:number], strides[:number], strict=True))
            found += [place.inside(0, strides[number], left) for place in places(factor, atom)]
    return found


def is_squared(term: Term, atom: Atom) -> bool:
    """Whether `atom` stands in two factors of one product."""
    term = resolve(term)
    if isinstance(term, Atom):
        return False
    if isinstance(term, Sum):
        return any(is_squared(part, atom) for part in term.parts)
    holding = [factor for factor in term.factors if atom in leaves(factor)]
    return len(holding) > 1 or any(is_squared(factor, atom) for factor in holding)


def slices(tensor: str, axis: int, place: Place, parent: Atom | None = None) -> list[AxisSlice]:
    """Express a place as slices of an axis.

    With `parent` a unit is one thing of the atom under one thing of the parent, a factor to its left: the units of the
    first parent come first. Repetitions that one slice cannot say are several slices.
    """
    repeats = _merged([(sibling.size, stride) for sibling, stride in place.siblings if sibling is not parent])
    gap = sum(stride - place.units * place.width for sibling, stride in place.siblings if sibling is parent)
    *outer, (count, stride) = repeats or [(1, 0)]
    offsets = [place.offset]
    for times, far in outer:
        offsets = [offset + number * far for offset in offsets for number in range(times)]
    return [
        AxisSlice(
            tensor=tensor,
            axis=axis,
            width=place.width,
            offset=offset,
            repeat=count,
            stride=stride,
            # Runs without a gap are no runs.
            run=place.units if gap else 0,
            gap=gap,
        )
        for offset in offsets
    ]


def _merged(repeats: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge repetitions, the outermost first, that are one: a rows of b at a distance of b are a * b rows."""
    merged: list[tuple[int, int]] = []
    for count, stride in repeats:
        if merged and merged[-1][1] == count * stride:
            merged[-1] = (merged[-1][0] * count, stride)
        else:
            merged.append((count, stride))
    return merged


def find_families(
    parameters: Mapping[str, tuple[Term, ...]], contracted: Sequence[tuple[Term, Sequence[str]]]
) -> tuple[tuple[Family, ...], tuple[FrozenAxis, ...]]:
    """Find the families of all axes, and the parts of axes that cannot shrink.

    `contracted` has the terms that products sum over, each with the parameters among the factors.
    """
    axes = [(name, axis, term) for name, dims in parameters.items() for axis, term in enumerate(dims)]
    for name, axis, term in axes:
        for atom in leaves(term):
            if is_squared(term, atom):
                atom.pins[f"axis {axis} of {name} has the units twice"] = None
    where: dict[Atom, list[tuple[str, int, Term]]] = {}
    frozen: list[FrozenAxis] = []
    for name, axis, term in axes:
        for atom in leaves(term):
            if atom.pins:
                frozen.append(FrozenAxis(tensor=name, axis=axis, size=atom.size, reasons=tuple(atom.pins)))
            else:
                where.setdefault(atom, []).append((name, axis, term))
    reads = {(name, atom) for term, names in contracted for atom in leaves(term) for name in names}
    families = [
        Family(
            atom=atom,
            members=tuple(
                each for name, axis, term in found for place in places(term, atom) for each in slices(name, axis, place)
            ),
            # A square map that computes and reads the same units is neither.
            reading=frozenset(
                (name, axis)
                for name, axis, _ in found
                if (name, atom) in reads and sum(other == name for other, _, _ in found) == 1
            ),
        )
        for atom, found in where.items()
    ]
    return tuple(families), tuple(frozen)
