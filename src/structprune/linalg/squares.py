"""Parts and products of a Gram matrix in float64, a strip of rows at a time: no copy of the whole is made.

Shape suffixes: I inputs, A and B some of them, O outputs, S rows of one strip.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# A sixteenth of the rows, but no more bytes and no fewer rows than this.
_STRIP_BYTES = 64 * 2**20
_STRIP_ROWS = 64


def strip_rows(count: int, row_numbers: int) -> int:
    """How many of `count` rows of `row_numbers` float64 numbers make a strip."""
    return min(max(_STRIP_ROWS, count // 16), max(1, _STRIP_BYTES // (8 * max(1, row_numbers))))


def strips(count: int, row_numbers: int) -> Iterator[slice]:
    """Slices of 0..count, each a strip of rows of `row_numbers` float64 numbers, the last perhaps a smaller one."""
    step = strip_rows(count, row_numbers)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def block_of(gram_II: Tensor, rows_A: Tensor, columns_B: Tensor) -> Tensor:
    """G[A, B], a new float64 matrix."""
    block_AB = torch.empty(len(rows_A), len(columns_B), dtype=torch.float64, device=gram_II.device)
    for part in strips(len(rows_A), gram_II.shape[1]):
        block_AB[part] = gram_II[rows_A[part]][:, columns_B].to(torch.float64)
    return block_AB


def times_gram(left_OA: Tensor, gram_II: Tensor, rows_A: Tensor | None, columns_B: Tensor | None) -> Tensor:
    """L G[A, B] in float64, (O, B); without a set, all inputs. G is symmetric: its rows are read for its columns."""
    num_inputs = gram_II.shape[0]
    count = num_inputs if columns_B is None else len(columns_B)
    left_OA = left_OA.to(torch.float64)
    product_OB = left_OA.new_empty(len(left_OA), count)
    for part in strips(count, num_inputs):
        rows_SA = gram_II[part] if columns_B is None else gram_II[columns_B[part]]
        rows_SA = (rows_SA if rows_A is None else rows_SA[:, rows_A]).to(torch.float64)
        product_OB[:, part] = left_OA @ rows_SA.T
    return product_OB


def output_energy(weight_OI: Tensor, gram_II: Tensor) -> float:
    """tr(W G W^T) in float64: sum over the tokens of |W x|^2."""
    weight_OI = weight_OI.to(torch.float64)
    total = 0.0
    for part in strips(gram_II.shape[0], gram_II.shape[0]):
        total += float(((weight_OI @ gram_II[part].to(torch.float64).T) * weight_OI[:, part]).sum())
    return total


def column_energies(values_OI: Tensor) -> Tensor:
    """sum_o v_oi^2 of every column in float64, (I,), without a square of the whole."""
    energy_I = values_OI.new_empty(values_OI.shape[1], dtype=torch.float64)
    for part in strips(values_OI.shape[1], values_OI.shape[0]):
        energy_I[part] = values_OI[:, part].to(torch.float64).square().sum(dim=0)
    return energy_I
