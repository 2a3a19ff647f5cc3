"""Patterns: exact counts with ties and zeros, the same over blocks of inputs, and masks that pack and unpack as 2:4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

# What the library itself packs 2:4 matrices with; it drops a third number of a group without a word.
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from structprune.errors import InputError
from structprune.patterns import NM, Pattern, Unstructured, as_pattern, pattern_name, share_of, sparse

PATTERNS: list[Pattern] = [
    *(Unstructured(share=share, scope=scope) for share in (0.0, 0.3, 0.5, 0.99) for scope in ("row", "layer")),
    *(NM(keep=keep, of=of) for keep, of in ((2, 4), (4, 8), (1, 4), (3, 4))),
]


def scores(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    """Few different numbers, so that most are equal to others, and many zeros."""
    return torch.randint(0, 5, (outputs, inputs), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: f"{pattern.name} {pattern.share:g}")
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_exact_whatever_the_ties(pattern: Pattern, seed: int) -> None:
    score_OI = scores(7, 24, seed)
    keep_OI = pattern.keep_largest(score_OI)
    assert int((~keep_OI).sum()) == round(pattern.share * 7 * 24 / 1) or isinstance(pattern, Unstructured)
    if isinstance(pattern, NM):
        assert (keep_OI.reshape(-1, pattern.of).sum(dim=1) == pattern.keep).all()
    elif pattern == Unstructured(share=pattern.share, scope="row"):
        assert ((~keep_OI).sum(dim=1) == round(pattern.share * 24)).all()
    else:
        assert int((~keep_OI).sum()) == round(pattern.share * 7 * 24)
    # Nothing that stays is worth less than something that goes beside it.
    for kept_I, score_I in zip(
        keep_OI.reshape(-1, _width(pattern)), score_OI.reshape(-1, _width(pattern)), strict=True
    ):
        if kept_I.any() and (~kept_I).any():
            assert score_I[kept_I].min() >= score_I[~kept_I].max()
    assert pattern.matches(sparse(torch.ones(7, 24), keep_OI))


def _width(pattern: Pattern) -> int:
    if isinstance(pattern, NM):
        return pattern.of
    return 24 if pattern.name == "unstructured:row" else 7 * 24


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: f"{pattern.name} {pattern.share:g}")
def test_of_equal_scores_the_lower_index_stays(pattern: Pattern) -> None:
    keep_OI = pattern.keep_largest(torch.ones(3, 8))
    order = keep_OI.reshape(-1, pattern.group if pattern.group > 1 else _rows_of(pattern)).int()
    assert (order.diff(dim=1) <= 0).all()


def sorted_mask(score_OI: Tensor, num_keep: int) -> Tensor:
    """What a stable sort of every row keeps."""
    order_OK = score_OI.abs().sort(dim=-1, descending=True, stable=True).indices[:, :num_keep]
    return torch.zeros_like(score_OI, dtype=torch.bool).scatter_(1, order_OK, value=True)


@pytest.mark.parametrize(
    "kind", ["normal", "rounded", "mostly zero", "equal", "transposed", "one sign in every column", "huge"]
)
def test_what_a_stable_sort_keeps(kind: str) -> None:
    """More numbers than a sample has, whatever their ties and their order."""
    generator = torch.Generator().manual_seed(1)
    normal_OI = torch.randn(160, 240, generator=generator)
    score_OI = {
        "normal": normal_OI,
        "rounded": normal_OI.round(decimals=1),
        "mostly zero": normal_OI * (torch.rand(160, 240, generator=generator) > 0.6),
        "equal": torch.ones(160, 240),
        "transposed": torch.randn(240, 160, generator=generator).T,
        # A sample of every other number would see one half.
        "one sign in every column": normal_OI * torch.tensor([1e-3, 1.0] * 120),
        "huge": normal_OI * 1e37,
    }[kind]
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        count = round((1 - share) * 160 * 240)
        whole = sorted_mask(score_OI.reshape(1, -1), count).view(160, 240)
        assert torch.equal(Unstructured(share=share, scope="layer").keep_largest(score_OI), whole)
        rows = sorted_mask(score_OI, 240 - round(share * 240))
        assert torch.equal(Unstructured(share=share, scope="row").keep_largest(score_OI), rows)
    for keep, of in ((2, 4), (1, 4), (3, 5), (4, 8), (7, 16), (3, 20)):
        groups = sorted_mask(score_OI.reshape(-1, of), keep).view(160, 240)
        assert torch.equal(NM(keep=keep, of=of).keep_largest(score_OI), groups), (keep, of)


def _rows_of(pattern: Pattern) -> int:
    return 8 if pattern.name == "unstructured:row" else 24


def test_the_threshold_of_a_whole_matrix_is_that_of_a_sort() -> None:
    generator = torch.Generator().manual_seed(3)
    score_OI = torch.rand(33, 17, generator=generator) * torch.logspace(-30, 20, 17)
    for share in (0.1, 0.5, 0.9):
        keep_OI = Unstructured(share=share, scope="layer").keep_largest(score_OI)
        count = 33 * 17 - round(share * 33 * 17)
        assert torch.equal(keep_OI.flatten().nonzero().flatten(), score_OI.flatten().topk(count).indices.sort().values)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: f"{pattern.name} {pattern.share:g}")
def test_blocks_of_inputs_lose_what_the_matrix_loses(pattern: Pattern) -> None:
    score_OI = scores(5, 48)
    gone = [pattern.remove_in_block(score_OI[:, start : start + 16], start) for start in (0, 16, 32)]
    assert int(torch.cat(gone, dim=1).sum()) == int((~pattern.keep_largest(score_OI)).sum())
    removed_O, gone = torch.zeros(5, dtype=torch.int64), []
    for start in (0, 16, 32):
        gone.append(pattern.remove_of_rest(score_OI[:, start:], removed_O, 48)[:, :16])
        removed_O += gone[-1].sum(dim=1)
    assert torch.equal(torch.cat(gone, dim=1).sum(), (~pattern.keep_largest(score_OI)).sum())


def test_two_of_four_packs_and_unpacks() -> None:
    """The library's own packing gives the matrix back, and does not where a group has three numbers."""
    weight_OI = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).half()
    pruned_OI = sparse(weight_OI, NM(keep=2, of=4).keep_largest(weight_OI.float().abs()))

    def unpacked(matrix_OI: Tensor) -> Tensor:
        return sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(matrix_OI))

    assert NM(keep=2, of=4).matches(pruned_OI)
    assert torch.equal(unpacked(pruned_OI), pruned_OI)
    third = pruned_OI.clone()
    third[0, :4] = 1
    third[0, 3] = 0
    assert not NM(keep=2, of=4).matches(third)
    assert not torch.equal(unpacked(third), third)


def test_zeros_have_no_sign() -> None:
    weight_OI = -torch.ones(2, 4)
    zeros = sparse(weight_OI, torch.zeros(2, 4, dtype=torch.bool))
    assert not torch.signbit(zeros).any()
    assert torch.signbit(weight_OI * 0).all()


@pytest.mark.parametrize(
    ("said", "name"), [("2:4", "2:4"), (124, "2:4"), ("unstructured", "unstructured"), (72, "1:12")]
)
def test_names(said: str | int, name: str) -> None:
    """YAML reads 2:4 as a number to base 60."""
    assert pattern_name(said) == name


def test_names_make_patterns() -> None:
    assert as_pattern("unstructured", 0.3, "row") == Unstructured(share=0.3, scope="row")
    assert as_pattern("unstructured:layer", 0.3, "row") == Unstructured(share=0.3, scope="layer")
    assert as_pattern("1:4", 0.3, "row") == NM(keep=1, of=4)
    assert share_of("1:4") == 0.75
    assert share_of("unstructured") is None


@pytest.mark.parametrize("name", ["", "2:4:8", "0:4", "4:4", "5:4", "rows", "2/4", True, 3, "-1:4"])
def test_no_names(name: str | int) -> None:
    with pytest.raises(InputError, match="--pattern"):
        pattern_name(name)
