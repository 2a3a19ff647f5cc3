"""Terms: an axis that is split, cut or unified keeps the same positions, whatever leaves it; else it is pinned.

The oracle is counting: which positions of an axis are left when some things of its atoms are gone.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structprune.tracing.terms import (
    Atom,
    Product,
    Sum,
    Term,
    couple,
    cut,
    describe,
    kept_positions,
    leaves,
    pin,
    pinned,
    resolve,
    split,
    unify,
)


def terms(depth: int = 2) -> st.SearchStrategy[Term]:
    """Expressions of a few hundred things at most: their positions are listed."""
    atoms = st.integers(1, 5).map(Atom)
    if depth == 0:
        return atoms
    below = terms(depth - 1)
    pieces = st.lists(below, min_size=1, max_size=3).map(tuple)
    return st.one_of(atoms, pieces.map(Product), pieces.map(Sum)).filter(lambda term: term.size <= 300)


def some_kept(seed: int, *of: Term) -> dict[Atom, list[int]]:
    """A random choice of what stays of every atom, at least one thing."""
    rng = random.Random(seed)
    return {atom: sorted(rng.sample(range(atom.size), rng.randint(1, atom.size))) for atom in leaves(*of)}


def copy_of(term: Term) -> Term:
    """The same expression with atoms of its own."""
    if isinstance(term, Atom):
        return Atom(term.size)
    if isinstance(term, Product):
        return Product(tuple(map(copy_of, term.factors)))
    return Sum(tuple(map(copy_of, term.parts)))


def is_pinned(*of: Term) -> bool:
    return all(atom.pins for atom in leaves(*of))


@settings(deadline=None)
@given(terms(), st.integers(0, 9), st.data())
def test_a_split_axis_is_its_factors(term: Term, seed: int, data: st.DataObject) -> None:
    size = term.size
    left_size = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    left, right = split(term, left_size, "view")
    assert (left.size, right.size) == (left_size, size // left_size)
    if is_pinned(term):
        return
    kept = some_kept(seed, term)
    rows, columns = kept_positions(left, kept), kept_positions(right, kept)
    assert kept_positions(term, kept) == [row * right.size + column for row in rows for column in columns]


@settings(deadline=None)
@given(terms(), st.integers(0, 9), st.data())
def test_a_cut_axis_is_its_segments(term: Term, seed: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, term.size))
    before, after = cut(term, position, "slice")
    assert (before.size, after.size) == (position, term.size - position)
    if is_pinned(term):
        return
    kept = some_kept(seed, term)
    behind = [position + place for place in kept_positions(after, kept)]
    assert kept_positions(term, kept) == kept_positions(before, kept) + behind


@settings(deadline=None)
@given(terms(), terms(), st.integers(0, 9))
def test_unified_axes_lose_the_same_positions(first: Term, second: Term, seed: int) -> None:
    # Two expressions of one size: each beside a remainder of its own.
    size = max(first.size, second.size)
    one, other = Sum((first, Atom(size - first.size))), Sum((second, Atom(size - second.size)))
    unify(one, other, "add")
    kept = some_kept(seed, one, other)
    if not is_pinned(one, other):
        assert kept_positions(one, kept) == kept_positions(other, kept)


@settings(deadline=None)
@given(terms(), st.integers(0, 9))
def test_unifying_with_an_atom_or_a_copy_never_fails(term: Term, seed: int) -> None:
    whole, copy = Atom(term.size), copy_of(term)
    unify(whole, term, "add")
    unify(copy, whole, "mul")
    kept = some_kept(seed, term)
    assert kept_positions(whole, kept) == kept_positions(copy, kept) == kept_positions(term, kept)
    assert not any(atom.pins for atom in leaves(term))


def test_products_are_refined() -> None:
    heads, size = Atom(4), Atom(6)
    columns = Product((Atom(2), Atom(12)))
    unify(Product((heads, size)), columns, "view")
    # 4 * 6 and 2 * 12: 2 * 2 * 6.
    assert describe(columns) == "2 * 2 * 6"
    assert describe(heads) == "2 * 2"
    assert leaves(size).keys() <= leaves(columns).keys()


def test_sums_are_cut_at_each_others_boundaries() -> None:
    fused, heads = Atom(24), Product((Atom(2), Atom(4)))
    unify(fused, Sum((heads, Atom(8), Atom(8))), "cat")
    left, _ = cut(fused, 16, "slice")
    assert describe(fused) == "(2 * 4) + 8 + 8"
    assert describe(left) == "(2 * 4) + 8"


def test_a_sum_of_equal_runs_is_a_product() -> None:
    """Queries and keys, one behind the other, seen as heads of one size: the size is the same for both."""
    queries, keys = Atom(32), Atom(16)
    heads, size = split(Sum((queries, keys)), 6, "view")
    assert describe(heads) == "4 + 2"
    assert leaves(size).keys() <= leaves(queries).keys() & leaves(keys).keys()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Product((Atom(2), Atom(3))), Product((Atom(3), Atom(2)))),
        (Product((Atom(3), Atom(4))), Sum((Atom(6), Atom(6)))),
        (Atom(6), Atom(7)),
    ],
)
def test_what_does_not_align_is_pinned_with_its_operation(first: Term, second: Term) -> None:
    unify(first, second, "add (add_1)")
    assert all("add (add_1)" in atom.pins for atom in leaves(first, second))


def test_reasons_go_where_the_atom_goes() -> None:
    held, rows, free = pinned(8, "input x"), Atom(8), Atom(5)
    couple("mean (mean)", rows)
    unify(rows, held, "add")
    heads, size = split(rows, 2, "view")
    assert list(resolve(heads).pins) == ["input x"]  # pyright: ignore[reportAttributeAccessIssue]
    assert list(resolve(size).couplings) == ["mean (mean)"]  # pyright: ignore[reportAttributeAccessIssue]
    pin("output", Product((free, heads)))
    assert list(free.pins) == ["output"]


def test_an_atom_that_is_its_own_transpose_is_one_thing() -> None:
    """a * b = b * a with a = 2 and b = 4 leaves one sort of pairs: both are made of it."""
    a, b = Atom(2), Atom(4)
    unify(Product((a, b)), Product((b, a)), "add")
    assert len(leaves(a, b)) == 1
    assert describe(b) == "2 * 2"
