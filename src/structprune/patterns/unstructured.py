"""Zeros anywhere: a share of each row, or of the whole matrix.

Shape suffixes: O outputs, I inputs, B inputs of one block of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from structprune.patterns.pattern import keep_in_rows, keep_of_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Unstructured:
    """A share of the weights goes, wherever they are."""

    share: float
    scope: Literal["row", "layer"]
    """What is counted apart: every row, so that all outputs keep as many weights, or the matrix as a whole."""

    @property
    def name(self) -> str:
        """The pattern as the command line writes it."""
        return f"unstructured:{self.scope}"

    @property
    def group(self) -> int:
        """1: every weight is decided by itself."""
        return 1

    @property
    def by_rows(self) -> bool:
        """Whether what stays of a row does not depend on the others."""
        return self.scope == "row"

    @property
    def runs_faster(self) -> str:
        """Where such zeros make anything faster, a sentence."""
        return "Zeros anywhere make products faster with research kernels only; no stock runtime uses them."

    def check(self, num_inputs: int, where: str) -> None:
        """Accept rows of any length."""

    def keep_largest(self, score_OI: Tensor) -> Tensor:
        """Choose the weights of the largest scores, whatever their sign. Of equal ones the lower index stays."""
        outputs, inputs = score_OI.shape
        if self.scope == "row":
            return keep_in_rows(score_OI, inputs - round(self.share * inputs))
        return keep_of_all(score_OI, outputs * inputs - round(self.share * outputs * inputs))

    def remove_in_block(self, score_OB: Tensor, start: int) -> Tensor:
        """Choose what goes of the block from `start`: its part of the matrix's or of every row's share."""
        outputs, width = score_OB.shape
        stop = start + width
        if self.scope == "row":
            count = round(self.share * stop) - round(self.share * start)
            return ~keep_in_rows(score_OB, width - count)
        count = round(self.share * outputs * stop) - round(self.share * outputs * start)
        return ~keep_of_all(score_OB, outputs * width - count)

    def remove_of_rest(self, score_OR: Tensor, removed_O: Tensor, num_inputs: int) -> Tensor:
        """Choose what goes of the last inputs, by what is left of every row's or of the matrix's share."""
        outputs, width = score_OR.shape
        if self.scope == "row":
            place_OR = score_OR.argsort(dim=-1, stable=True).argsort(dim=-1)
            return place_OR < (round(self.share * num_inputs) - removed_O)[:, None]
        count = round(self.share * outputs * num_inputs) - int(removed_O.sum())
        return ~keep_of_all(score_OR, outputs * width - count)

    def matches(self, weight_OI: Tensor) -> bool:
        """Whether a weight has at least as many zeros, in every row or in all."""
        outputs, inputs = weight_OI.shape
        # A sum would make a copy in int64 first.
        zeros_O = inputs - weight_OI.count_nonzero(dim=1)
        if self.scope == "row":
            return bool((zeros_O >= round(self.share * inputs)).all())
        return int(torch.sum(zeros_O)) >= round(self.share * outputs * inputs)
