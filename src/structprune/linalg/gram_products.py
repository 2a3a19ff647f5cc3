"""Parts and products of a Gram matrix in float64, a strip of rows at a time: no copy of the whole is made.

Shape suffixes: I inputs, A and B some of them, K kept ones, O outputs, S rows of one strip.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from structprune.rows import Rows

# A sixteenth of the rows, but no more bytes and no fewer rows than this.
_STRIP_BYTES = 64 * 2**20
_STRIP_ROWS = 64


def strip_rows(count: int, row_numbers: int) -> int:
    """Return how many of `count` rows of `row_numbers` float64 numbers make a strip."""
    return min(max(_STRIP_ROWS, count // 16), max(1, _STRIP_BYTES // (8 * max(1, row_numbers))))


def strips(count: int, row_numbers: int) -> Iterator[slice]:
    """Yield slices of 0..count, each a strip of rows of `row_numbers` float64 numbers, the last perhaps smaller."""
    step = strip_rows(count, row_numbers)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def block_of(gram_II: Rows, rows_A: Tensor, columns_B: Tensor) -> Tensor:
    """Copy G[A, B] to a new float64 matrix."""
    block_AB = torch.empty(len(rows_A), len(columns_B), dtype=torch.float64, device=gram_II.device)
    for part in strips(len(rows_A), gram_II.shape[1]):
        block_AB[part] = gram_II[rows_A[part]][:, columns_B].to(torch.float64)
    return block_AB


def in_float64(values_OI: Rows) -> Tensor:
    """Copy the whole of a matrix to a new one in float64."""
    wide_OI = torch.empty(values_OI.shape, dtype=torch.float64, device=values_OI.device)
    for part in strips(*values_OI.shape):
        wide_OI[part] = values_OI[part]
    return wide_OI


def times_gram(left_OA: Tensor, gram_II: Rows, rows_A: Tensor | None, columns_B: Tensor | None) -> Tensor:
    """Compute L G[A, B] in float64, (O, B); without a set, all inputs. G is symmetric: its rows are read as columns."""
    num_inputs = gram_II.shape[0]
    count = num_inputs if columns_B is None else len(columns_B)
    left_OA = left_OA.to(torch.float64)
    product_OB = left_OA.new_empty(len(left_OA), count)
    for part in strips(count, num_inputs):
        rows_SA = gram_II[part] if columns_B is None else gram_II[columns_B[part]]
        rows_SA = (rows_SA if rows_A is None else rows_SA[:, rows_A]).to(torch.float64)
        product_OB[:, part] = left_OA @ rows_SA.T
    return product_OB


def output_energy(
    weight_OA: Tensor, gram_II: Rows, inputs_A: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> float:
    """Compute tr(W G[A, A] W^T): the sum over the tokens of |W x_A|^2. Products in `dtype`, their sum in float64.

    Without a set, A is all inputs. Each pair of inputs is read once: half the product.
    """
    weight_OA = weight_OA.to(dtype)
    total = 0.0
    for part in strips(weight_OA.shape[1], gram_II.shape[0]):
        rows_SA = gram_II[part] if inputs_A is None else gram_II[inputs_A[part]]
        rest = slice(part.start, None) if inputs_A is None else inputs_A[part.start :]
        rows_SA = rows_SA[:, rest].to(dtype)
        count = len(rows_SA)
        own_OS = weight_OA[:, part]
        product_OS = weight_OA[:, part.stop :] @ rows_SA[:, count:].T
        product_OS = (own_OS @ rows_SA[:, :count].T).add_(product_OS, alpha=2)
        total += float((product_OS * own_OS).sum(dtype=torch.float64))
    return total


def energy(x: Tensor) -> Tensor:
    """Sum of squares, each row's in float32 or wider, theirs in float64: a scalar on the same device, without a copy.

    A sum in float64 over numbers of a narrower dtype takes 25 times as long.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=wide).to(torch.float64).square().sum()


def add_columns(sum_OK: Tensor, values_OI: Rows, columns_K: Tensor | None) -> Tensor:
    """Add V[:, K], without a set all of V, to the float64 `sum_OK`, in place, and return it.

    A sum of two dtypes as a whole would make a float64 copy of what is added, as large as the sum.
    """
    for part in strips(len(sum_OK), values_OI.shape[1]):
        values_SI = values_OI[part]
        sum_OK[part] += (values_SI if columns_K is None else values_SI[:, columns_K]).to(torch.float64)
    return sum_OK


def column_energies(values_OI: Tensor) -> Tensor:
    """Compute sum_o v_oi^2 of every column in float64, (I,), without a square of the whole."""
    energy_I = values_OI.new_empty(values_OI.shape[1], dtype=torch.float64)
    for part in strips(values_OI.shape[1], values_OI.shape[0]):
        energy_I[part] = values_OI[:, part].to(torch.float64).square().sum(dim=0)
    return energy_I


def fitting_error(
    weight_OK: Tensor, kept_K: Tensor, original_OI: Tensor, gram_II: Rows, target_OI: Rows | None, energy: float
) -> float:
    """Compute the sum over tokens of |V x_K - y|^2 in float64, never below zero.

    With a target C = sum y x^T and `energy` sum |y|^2; without one y is W x, W the original weight on all inputs.
    """
    if target_OI is None:
        # From the difference of the weights: nothing cancels.
        difference_OI = original_OI.to(torch.float64, copy=True).neg_()
        for part in strips(len(difference_OI), difference_OI.shape[1]):
            difference_OI[part].index_add_(1, kept_K, weight_OK[part].to(torch.float64))
        return max(0.0, output_energy(difference_OI, gram_II))
    weight_OK = weight_OK.to(torch.float64)
    met = 0.0
    for part in strips(len(weight_OK), target_OI.shape[1]):
        met += float((weight_OK[part] * target_OI[part][:, kept_K].to(torch.float64)).sum())
    return max(0.0, energy + output_energy(weight_OK, gram_II, kept_K) - 2.0 * met)
