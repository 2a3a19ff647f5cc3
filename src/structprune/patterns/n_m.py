"""N of every M consecutive inputs of a row stay, such as 2:4.

Other code passes the number that goes where this one has the number that stays: for 1:4 that is another pattern.

Shape suffixes: O outputs, I inputs, B inputs of one block of them, M places in a group, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from structprune.errors import InputError
from structprune.patterns.pattern import keep_in_rows

_ON_TENSOR_CORES = (2, 4)
# Places of a group that are compared in a network.
_IN_A_NETWORK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class NM:
    """`keep` weights stay in every group of `of`."""

    keep: int
    of: int

    @property
    def share(self) -> float:
        """The share of zeros."""
        return 1 - self.keep / self.of

    @property
    def name(self) -> str:
        """The pattern as the command line writes it."""
        return f"{self.keep}:{self.of}"

    @property
    def group(self) -> int:
        """How many consecutive inputs of one row are decided together."""
        return self.of

    @property
    def by_rows(self) -> bool:
        """True: groups do not cross rows."""
        return True

    @property
    def runs_faster(self) -> str:
        """Where such zeros make anything faster, a sentence."""
        if (self.keep, self.of) == _ON_TENSOR_CORES:
            return (
                "NVIDIA GPUs from compute capability 8.0 on multiply 2:4 matrices faster where products are large, as "
                "in prefill or with large batches, through `torch.sparse.to_sparse_semi_structured` or TensorRT; "
                "decoding at batch 1 is not faster, and vLLM has dropped its kernels."
            )
        return f"No known kernel multiplies {self.name} matrices faster."

    def check(self, num_inputs: int, where: str) -> None:
        """Raise InputError where rows of so many weights have no whole number of groups."""
        if num_inputs % self.of:
            raise InputError(
                f"a pattern of {self.name} needs rows of a multiple of {self.of} weights",
                where=where,
                got=f"{num_inputs} inputs",
                do="use --pattern unstructured, a smaller group, or another --scope",
            )

    def keep_largest(self, score_OI: Tensor) -> Tensor:
        """Choose the weights of the largest scores in each group, whatever their sign.

        Of equal ones the lower index stays.
        """
        score_GM = score_OI.reshape(-1, self.of).abs()
        if self.of > _IN_A_NETWORK:
            return keep_in_rows(score_GM, self.keep).view(score_OI.shape)
        # Ten times as fast as sorting so few.
        keep_GM = score_GM >= _nth_largest(score_GM, self.keep)[:, None]
        if int(keep_GM.count_nonzero()) != len(keep_GM) * self.keep:
            tied = (keep_GM.sum(dim=1) != self.keep).nonzero().flatten()
            keep_GM[tied] = keep_in_rows(score_GM[tied], self.keep)
        return keep_GM.view(score_OI.shape)

    def remove_in_block(self, score_OB: Tensor, start: int) -> Tensor:
        """Choose what goes of whole groups of inputs."""
        return ~self.keep_largest(score_OB)

    def remove_of_rest(self, score_OR: Tensor, removed_O: Tensor, num_inputs: int) -> Tensor:
        """Choose what goes of all remaining groups."""
        return ~self.keep_largest(score_OR)

    def matches(self, weight_OI: Tensor) -> bool:
        """Whether no group has more than `keep` weights that are not zero."""
        if weight_OI.shape[1] % self.of:
            return False
        groups_GM = weight_OI.reshape(-1, self.of)
        # A sum would make a copy in int64 first.
        return bool((groups_GM.count_nonzero(dim=1) <= self.keep).all())


def _nth_largest(score_GM: Tensor, place: int) -> Tensor:
    """Return the `place`-th largest of each row, (G,), by comparing all rows' numbers of two places at a time."""
    columns = list(score_GM.unbind(dim=1))
    for first, second, larger, smaller in _network(score_GM.shape[1], place - 1):
        one_G, other_G = columns[first], columns[second]
        if larger:
            columns[first] = torch.maximum(one_G, other_G)
        if smaller:
            columns[second] = torch.minimum(one_G, other_G)
    return columns[place - 1]


@cache
def _network(size: int, wanted: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Return what Batcher's network for so many numbers compares for the one at place `wanted` of a falling order.

    Pairs of places, and whether the larger one (first) and the smaller one (second) is needed later: Knuth, The Art of
    Computer Programming, volume 3, algorithm 5.2.2M.
    """
    pairs: list[tuple[int, int]] = []
    top = 1 << max(0, (size - 1).bit_length() - 1)
    p = top
    while p:
        q, r, distance = top, 0, p
        while True:
            pairs += [(i, i + distance) for i in range(size - distance) if i & p == r]
            if q == p:
                break
            distance, q, r = q - p, q >> 1, p
        p >>= 1
    needed, found = {wanted}, list[tuple[int, int, bool, bool]]()
    for first, second in reversed(pairs):
        larger, smaller = first in needed, second in needed
        if larger or smaller:
            found.append((first, second, larger, smaller))
            needed |= {first, second}
    return tuple(reversed(found))
