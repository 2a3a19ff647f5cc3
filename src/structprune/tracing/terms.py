"""Sizes of axes as expressions, and their unification. Pure arithmetic: nothing here knows tensors or models.

A term is an atom (n things of one kind), a product (row-major: the last factor runs fastest) or a sum (segments, one
behind the other). The rows of a fused map of queries, keys and values are Sum(heads * size, groups * size, groups *
size). Two axes that an operation ties together are unified: an atom takes the other's expression, products are refined
until their factors agree, sums are cut at each other's boundaries. What cannot be refined is pinned: its atoms cannot
shrink, with the operation as the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Atom:
    """Things of one kind that may leave one by one, unless a reason holds them."""

    size: int
    bound: Term | None = None
    """Finer expression or other atom that has taken its place."""
    pins: dict[str, None] = field(default_factory=dict[str, None])
    """Operations, or inputs and outputs, for which the atom cannot shrink; in the order in which they came."""
    couplings: dict[str, None] = field(default_factory=dict[str, None])
    """Operations that see all things of the atom at once (norms, softmax): removal is not the same as zeros."""


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Row-major product; the last factor runs fastest."""

    factors: tuple[Term, ...]

    @property
    def size(self) -> int:
        return math.prod(factor.size for factor in self.factors)


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """Segments one behind the other."""

    parts: tuple[Term, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


Term = Atom | Product | Sum


class _MisalignedError(Exception):
    """Two expressions of one axis have boundaries that no refinement brings together."""


def resolve(term: Term) -> Term:
    """Return what stands for `term` by now: no bound atoms, no products in products, no sums in sums.

    Factors of size 1 and segments of size 0 are left out.
    """
    if isinstance(term, Atom):
        if term.bound is None:
            return term
        term.bound = resolve(term.bound)
        return term.bound
    if isinstance(term, Product):
        flat = [piece for factor in map(resolve, term.factors) for piece in _pieces(factor, Product) if piece.size != 1]
        return flat[0] if len(flat) == 1 else Product(tuple(flat))
    flat = [piece for part in map(resolve, term.parts) for piece in _pieces(part, Sum) if piece.size != 0]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def _pieces(term: Term, kind: type[Product] | type[Sum]) -> tuple[Term, ...]:
    if isinstance(term, Product) and kind is Product:
        return term.factors
    if isinstance(term, Sum) and kind is Sum:
        return term.parts
    return (term,)


def atoms(*terms: Term) -> dict[Atom, None]:
    """Collect all atoms that the terms are made of, in order, those of a single thing too."""
    found: dict[Atom, None] = {}
    for term in map(resolve, terms):
        if isinstance(term, Atom):
            found[term] = None
        else:
            found |= atoms(*(term.factors if isinstance(term, Product) else term.parts))
    return found


def leaves(*terms: Term) -> dict[Atom, None]:
    """Collect the atoms of more than one thing that the terms are made of, in order."""
    return {atom: None for atom in atoms(*terms) if atom.size > 1}


def pin(reason: str, *terms: Term) -> None:
    """Hold every atom of `terms` as it is; `reason` names what needs that."""
    for atom in leaves(*terms):
        atom.pins[reason] = None


def couple(reason: str, *terms: Term) -> None:
    """Note that `reason` sees all things of every atom of `terms` together."""
    for atom in leaves(*terms):
        atom.couplings[reason] = None


def pinned(size: int, reason: str) -> Atom:
    """Build an atom that cannot shrink."""
    return Atom(size, pins={reason: None})


def _bind(atom: Atom, term: Term) -> None:
    atom.bound = term
    for reason in atom.pins:
        pin(reason, term)
    for reason in atom.couplings:
        couple(reason, term)


def unify(first: Term, second: Term, reason: str) -> None:
    """Make both terms the same expression; where they do not align, pin both for `reason`."""
    try:
        _unify(first, second)
    except _MisalignedError:
        pin(reason, first, second)


def split(term: Term, left: int, reason: str) -> tuple[Term, Term]:
    """Express `term` as (left, right) with a left factor of size `left`; else pin it and return pinned atoms."""
    try:
        return _split(term, left)
    except _MisalignedError:
        pin(reason, term)
        return pinned(left, reason), pinned(term.size // left, reason)


def cut(term: Term, position: int, reason: str) -> tuple[Term, Term]:
    """Express `term` as the sum of its first `position` things and the rest; else pin it and return pinned atoms."""
    try:
        return _cut(term, position)
    except _MisalignedError:
        pin(reason, term)
        return pinned(position, reason), pinned(term.size - position, reason)


def _unify(first: Term, second: Term) -> None:
    first, second = resolve(first), resolve(second)
    if first is second:
        return
    if first.size != second.size:
        raise _MisalignedError
    if first.size <= 1:
        return
    if isinstance(first, Atom):
        _bind(first, second)
    elif isinstance(second, Atom):
        _bind(second, first)
    elif isinstance(first, Product) and isinstance(second, Product):
        _unify_products(list(first.factors), list(second.factors))
    else:
        _unify_segments(first, second)


def _unify_products(first: list[Term], second: list[Term]) -> None:
    while first and second:
        one, other = first.pop(0), second.pop(0)
        size = min(one.size, other.size)
        left, rest = _split(one, size)
        other_left, other_rest = _split(other, size)
        _unify(left, other_left)
        first = [rest, *first] if rest.size > 1 else first
        second = [other_rest, *second] if other_rest.size > 1 else second


def _unify_segments(first: Term, second: Term) -> None:
    ends = sorted({end for term in (first, second) if isinstance(term, Sum) for end in _ends(term)})
    start = 0
    for end in ends:
        left, first = _cut(first, end - start)
        other_left, second = _cut(second, end - start)
        _unify(left, other_left)
        start = end


def _ends(term: Sum) -> list[int]:
    ends, total = list[int](), 0
    for part in term.parts:
        total += part.size
        ends.append(total)
    return ends


def _split(term: Term, left: int) -> tuple[Term, Term]:
    if left == 1:
        return Product(()), term
    if left == term.size:
        return term, Product(())
    term = resolve(term)
    if left == 0 or term.size % left:
        raise _MisalignedError
    right = term.size // left
    if isinstance(term, Atom):
        pair = Atom(left), Atom(right)
        _bind(term, Product(pair))
        return pair
    if isinstance(term, Sum):
        if any(part.size % right for part in term.parts):
            raise _MisalignedError
        pairs = [_split(part, part.size // right) for part in term.parts]
        for _, other in pairs[1:]:
            _unify(pairs[0][1], other)
        return Sum(tuple(first for first, _ in pairs)), pairs[0][1]
    taken: list[Term] = []
    rest = list(term.factors)
    while left > 1:
        factor = rest.pop(0)
        if left % factor.size:
            # The boundary lies inside this factor, or nowhere.
            factor, inner = _split(factor, left)
            rest.insert(0, inner)
        taken.append(factor)
        left //= factor.size
    return Product(tuple(taken)), Product(tuple(rest))


def _cut(term: Term, position: int) -> tuple[Term, Term]:
    if position == 0:
        return Sum(()), term
    if position == term.size:
        return term, Sum(())
    term = resolve(term)
    if isinstance(term, Atom):
        pair = Atom(position), Atom(term.size - position)
        _bind(term, Sum(pair))
        return pair
    if isinstance(term, Sum):
        return _cut_segments(term, position)
    first, rest = term.factors[0], Product(term.factors[1:])
    if position % rest.size:
        raise _MisalignedError
    before, after = _cut(first, position // rest.size)
    return Product((before, rest)), Product((after, rest))


def _cut_segments(term: Sum, position: int) -> tuple[Term, Term]:
    before: list[Term] = []
    after: list[Term] = []
    start = 0
    for part in term.parts:
        inside = min(max(position - start, 0), part.size)
        left, right = _cut(part, inside)
        before.append(left)
        after.append(right)
        start += part.size
    return Sum(tuple(before)), Sum(tuple(after))


def kept_positions(term: Term, kept: Mapping[Atom, Sequence[int]]) -> list[int]:
    """List the positions of `term` that stay, ascending, where each atom of `kept` keeps those things."""
    term = resolve(term)
    if isinstance(term, Atom):
        return list(kept.get(term, range(term.size)))
    positions: list[int] = []
    if isinstance(term, Sum):
        start = 0
        for part in term.parts:
            positions += [start + position for position in kept_positions(part, kept)]
            start += part.size
        return positions
    positions = [0]
    for factor in term.factors:
        inner = kept_positions(factor, kept)
        positions = [position * factor.size + place for position in positions for place in inner]
    return positions


def describe(term: Term, names: Mapping[Atom, str] | None = None) -> str:
    """Write `term` as a formula: sizes of atoms, or their names, joined by * and +."""
    term = resolve(term)
    if isinstance(term, Atom):
        return (names or {}).get(term, str(term.size))
    inner: Iterable[Term] = term.factors if isinstance(term, Product) else term.parts
    texts = [describe(each, names) if isinstance(each, Atom) else f"({describe(each, names)})" for each in inner]
    return (" * " if isinstance(term, Product) else " + ").join(texts) or str(term.size)
