"""Gram matrix of a linear map's input, and its product with a target, accumulated over calibration tokens.

Shape suffixes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from structprune.errors import NOT_FINITE_ADVICE, NumericalError
from structprune.linalg.gram_products import energy
from structprune.linalg.products import exact_bfloat16_products
from structprune.memory import HEAP_BLOCK_BYTES
from structprune.ranks import Ranks, add_numbers

# Of columns: with four of them 10 of the 16 tiles of the symmetric product are computed.
NUM_STRIPS = 4


class GramAccumulator:
    """sum_t x_t and, in float32, sum_t x_t x_t^T: its upper strips; the lower triangle is mirrored by `finalize`.

    With `num_outputs` also sum_t y_t x_t^T in float32, and sum_t |y_t|^2, of what the map should give. The sums lie on
    `device`; with `apart` the tokens come on another one, which makes the products and sends them, a strip at a time.
    """

    def __init__(
        self, num_inputs: int, device: torch.device | str = "cpu", *, num_outputs: int = 0, apart: bool = False
    ) -> None:
        self._apart = apart
        self._gram_II = torch.zeros(num_inputs, num_inputs, dtype=torch.float32, device=device)
        self._strip = max(1, -(-num_inputs // NUM_STRIPS))
        self._wide_TI = torch.empty(0, device=device)
        self.sum_I = torch.zeros(num_inputs, dtype=torch.float64, device=device)
        self.target_OI = torch.zeros(num_outputs, num_inputs, device=device) if num_outputs else None
        self.target_energy = 0.0
        self.num_tokens = 0

    def update(self, x_TI: Tensor, target_TO: Tensor | None = None) -> None:
        """Add the tokens of one batch, (tokens, inputs) in any float dtype, and targets, (tokens, outputs) in float32.

        Products of bfloat16 numbers are exact in float32, so units that multiply bfloat16 and add in float32 lose
        nothing there; they are used where the CPU has them. Targets are then rounded too: they are differences of
        bfloat16 states, so they are known to half a unit of the larger state's last place, and no better.
        """
        narrow = x_TI.dtype == torch.bfloat16
        x_TI = self._widened(x_TI)
        with exact_bfloat16_products() if narrow else contextlib.nullcontext():
            for start in range(0, x_TI.shape[1], self._strip):
                stop = start + self._strip
                self._add(self._gram_II[start:stop, start:], x_TI[:, start:stop].T, x_TI[:, start:])
            if self.target_OI is not None:
                assert target_TO is not None
                self._add(self.target_OI, target_TO.T, x_TI)
                self.target_energy += float(energy(target_TO))
        self.sum_I += x_TI.sum(dim=0).to(self.sum_I.device)
        self.num_tokens += len(x_TI)

    def _add(self, sum_AB: Tensor, left_AT: Tensor, right_TB: Tensor) -> None:
        if self._apart:
            sum_AB += (left_AT @ right_TB).to(sum_AB.device)
        else:
            sum_AB.addmm_(left_AT, right_TB)

    def _widened(self, x_TI: Tensor) -> Tensor:
        """Cast to float32. A large copy stays for the next batch: the pages of a new one cost more than the copying."""
        if x_TI.dtype == torch.float32 or x_TI.numel() * 4 < HEAP_BLOCK_BYTES:
            return x_TI.to(torch.float32)
        if len(self._wide_TI) < len(x_TI):
            self._wide_TI = torch.empty(x_TI.shape, device=x_TI.device)
        return self._wide_TI[: len(x_TI)].copy_(x_TI)

    def merge(self, other: GramAccumulator) -> None:
        """Add another accumulator's tokens."""
        assert self._gram_II.shape == other._gram_II.shape
        self._gram_II += other._gram_II
        self.sum_I += other.sum_I
        if self.target_OI is not None:
            assert other.target_OI is not None
            self.target_OI += other.target_OI
            self.target_energy += other.target_energy
        self.num_tokens += other.num_tokens

    def reduce(self, ranks: Ranks, owner: int) -> None:
        """Sum over the ranks, at `owner`; elsewhere the accumulator cannot be used afterwards."""
        strips = range(0, len(self._gram_II), self._strip)
        ranks.reduce([self._gram_II[start : start + self._strip, start:] for start in strips], owner)
        ranks.reduce([self.sum_I], owner)
        self.num_tokens = int(add_numbers(ranks, [self.num_tokens], owner)[0])
        if self.target_OI is not None:
            ranks.reduce([self.target_OI], owner)
            (self.target_energy,) = add_numbers(ranks, [self.target_energy], owner)

    def finalize(self, where: str) -> Tensor:
        """Return the full symmetric Gram (I, I). Raises NumericalError if an activation was NaN or infinite.

        The accumulator gives its memory away and cannot be used afterwards.
        """
        gram_II = self._gram_II
        del self._gram_II, self._wide_TI
        diagonal = gram_II.diagonal()
        if not torch.isfinite(diagonal).all():
            bad = int((~torch.isfinite(diagonal)).sum())
            raise NumericalError(
                f"{bad} of {len(diagonal)} activations are NaN or infinite (or overflow when squared)",
                where=where,
                do=NOT_FINITE_ADVICE,
            )
        for start in range(0, len(gram_II), self._strip):
            stop = start + self._strip
            gram_II[stop:, start:stop] = gram_II[start:stop, stop:].T
        # Within a diagonal strip both triangles were computed, equal up to rounding; make them exactly equal.
        for start in range(0, len(gram_II), self._strip):
            tile = gram_II[start : start + self._strip, start : start + self._strip]
            tile.copy_(torch.triu(tile) + torch.triu(tile, 1).T)
        return gram_II
