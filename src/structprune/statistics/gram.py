"""Gram matrix of a linear map's input, accumulated over calibration tokens.

Shape suffixes: T tokens, I inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from structprune.errors import NumericalError
from structprune.ranks import Ranks, add_numbers

# Of columns: with four of them 10 of the 16 tiles of the symmetric product are computed.
NUM_STRIPS = 4


@contextlib.contextmanager
def exact_bfloat16_products() -> Generator[None]:
    """Inside the context the CPU multiplies float32 matrices as bfloat16 and adds in float32, where it can.

    For matrices whose values are bfloat16 numbers, where this is exact but for the order of the sums. Twice as fast on
    CPUs with matrix units, and no change on others.
    """
    products: Any = getattr(torch.backends.mkldnn, "matmul", None)
    # Older versions of torch have one setting for the whole process instead, which is not ours to change.
    before = getattr(products, "fp32_precision", None)
    if before is None:
        yield
        return
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


class GramAccumulator:
    """sum_t x_t and, in float32, sum_t x_t x_t^T: its upper strips; the lower triangle is mirrored by `finalize`."""

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        self._gram_II = torch.zeros(num_inputs, num_inputs, dtype=torch.float32, device=device)
        self._strip = max(1, -(-num_inputs // NUM_STRIPS))
        self.sum_I = torch.zeros(num_inputs, dtype=torch.float64, device=device)
        self.num_tokens = 0

    def update(self, x_TI: Tensor) -> None:
        """Add the tokens of one batch, shape (tokens, inputs) of any float dtype.

        Products of bfloat16 numbers are exact in float32, so units that multiply bfloat16 and add in float32 lose
        nothing there; they are used where the CPU has them.
        """
        products = exact_bfloat16_products() if x_TI.dtype == torch.bfloat16 else contextlib.nullcontext()
        x_TI = x_TI.to(torch.float32)
        with products:
            for start in range(0, x_TI.shape[1], self._strip):
                stop = start + self._strip
                self._gram_II[start:stop, start:].addmm_(x_TI[:, start:stop].T, x_TI[:, start:])
        self.sum_I += x_TI.sum(dim=0)
        self.num_tokens += len(x_TI)

    def merge(self, other: GramAccumulator) -> None:
        """Add another accumulator's tokens."""
        assert self._gram_II.shape == other._gram_II.shape
        self._gram_II += other._gram_II
        self.sum_I += other.sum_I
        self.num_tokens += other.num_tokens

    def add_up(self, ranks: Ranks, owner: int) -> None:
        """The sum over the ranks, at `owner`; elsewhere the accumulator cannot be used afterwards."""
        strips = range(0, len(self._gram_II), self._strip)
        ranks.add_up([self._gram_II[start : start + self._strip, start:] for start in strips], owner)
        ranks.add_up([self.sum_I], owner)
        self.num_tokens = int(add_numbers(ranks, [self.num_tokens], owner)[0])

    def finalize(self, where: str) -> Tensor:
        """The full symmetric Gram (I, I). Raises NumericalError if an activation was NaN or infinite.

        The accumulator gives its memory away and cannot be used afterwards.
        """
        gram_II = self._gram_II
        del self._gram_II
        diagonal = gram_II.diagonal()
        if not torch.isfinite(diagonal).all():
            bad = int((~torch.isfinite(diagonal)).sum())
            raise NumericalError(
                f"{bad} of {len(diagonal)} activations are NaN or infinite (or overflow when squared)",
                where=where,
                do="use --dtype float32; if it stays, the source checkpoint is damaged",
            )
        for start in range(0, len(gram_II), self._strip):
            stop = start + self._strip
            gram_II[stop:, start:stop] = gram_II[start:stop, stop:].T
        # Within a diagonal strip both triangles were computed, equal up to rounding; make them exactly equal.
        for start in range(0, len(gram_II), self._strip):
            tile = gram_II[start : start + self._strip, start : start + self._strip]
            tile.copy_(torch.triu(tile) + torch.triu(tile, 1).T)
        return gram_II
