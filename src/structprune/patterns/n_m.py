"""N of every M consecutive inputs of a row stay, such as 2:4.

Other code passes the number that goes where this one has the number that stays: for 1:4 that is another pattern.

Shape suffixes: O outputs, I inputs, B inputs of one block of them, M places in a group, G groups.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.errors import InputError
from structprune.patterns.pattern import keep_in_rows

_ON_TENSOR_CORES = (2, 4)
_COUNTED = 16


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
        """Choose the weights of the largest scores in each group. Of equal ones the lower index stays."""
        if self.of > _COUNTED:
            return keep_in_rows(score_OI.reshape(-1, self.of), self.keep).view(score_OI.shape)
        # Counting the better ones of each is ten times as fast as sorting so few.
        score_MG = score_OI.reshape(-1, self.of).T.contiguous()
        better_MG = torch.zeros(score_MG.shape, dtype=torch.uint8, device=score_MG.device)
        for first, second in itertools.combinations(range(self.of), 2):
            second_wins_G = score_MG[second] > score_MG[first]
            better_MG[first] += second_wins_G
            better_MG[second] += second_wins_G.logical_not_()
        return (better_MG < self.keep).T.reshape(score_OI.shape)

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
        return bool(((weight_OI.reshape(-1, self.of) != 0).sum(dim=1) <= self.keep).all())
