"""Rotation of a linear map's side onto the leading directions of a second moment.

Shape suffixes: D width of the residual stream, K directions that are kept, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structprune.errors import NOT_FINITE_ADVICE, NumericalError

CHUNK_BYTES = 16 * 2**20
"""Bytes of float64 numbers at a time while a weight is rotated."""


def principal_basis(gram_DD: Tensor, num_keep: int, damping: float, where: str) -> Tensor:
    """Compute the orthonormal eigenvectors (D, K) of a Gram's `num_keep` largest eigenvalues, descending, in float64.

    `damping` times the mean diagonal is added to the diagonal: it moves every eigenvalue and no eigenvector, so that
    directions without a signal are far from zero for the solver. Each column's entry of largest size is positive, as
    the sign is otherwise the library's whim. The Gram is only read; the result lies on its device.
    Raises NumericalError if the eigenvalues do not come out finite.
    """
    shifted_DD = gram_DD.to(torch.float64, copy=True)
    mean = float(shifted_DD.diagonal().mean()) or 1.0
    shifted_DD.diagonal().add_(damping * mean)
    values_D, vectors_DD = torch.linalg.eigh(shifted_DD)
    del shifted_DD
    if not torch.isfinite(values_D).all():
        raise NumericalError(
            "the eigenvalues of the residual stream are not finite",
            where=where,
            do=NOT_FINITE_ADVICE,
        )
    # Ascending from the library.
    basis_DK = vectors_DD[:, len(values_D) - num_keep :].flip(1)
    largest_1K = basis_DK.abs().argmax(dim=0, keepdim=True)
    # In rows, as one that was read from a file: products with another layout differ in their last bits.
    return (basis_DK * basis_DK.gather(0, largest_1K).sign()).contiguous()


def dropped_share(gram_DD: Tensor, basis_DK: Tensor) -> float:
    """Share of sum |x|^2 that is lost where x becomes B B^T x; zero for a stream of zeros."""
    gram_DD = gram_DD.to(torch.float64)
    total = float(gram_DD.trace())
    kept = float(((gram_DD @ basis_DK) * basis_DK).sum())
    return max(0.0, 1.0 - kept / total) if total > 0 else 0.0


def rotated(weight: Tensor, basis_DK: Tensor, axis: int, scale_D: Tensor | None = None) -> Tensor:
    """Express the `axis` of `weight`, of D entries, in the K columns of `basis_DK`, each entry scaled first.

    Along axis 1 this is W diag(scale) B, along axis 0 it is B^T diag(scale) W; a vector has axis 0 alone. Computed in
    float64, some rows at a time, and returned in the dtype of `weight` on its device.
    """
    moved = weight.movedim(axis, -1)
    rows_RD = moved.reshape(-1, moved.shape[-1]) if moved.ndim == 1 else moved
    scaled_DK = basis_DK if scale_D is None else scale_D.to(torch.float64)[:, None] * basis_DK
    rows_RK = torch.empty(len(rows_RD), basis_DK.shape[1], dtype=weight.dtype, device=weight.device)
    step = rows_per_chunk(rows_RD.shape[1])
    for start in range(0, len(rows_RD), step):
        chunk_RD = rows_RD[start : start + step].to(basis_DK.device, torch.float64)
        rows_RK[start : start + step] = (chunk_RD @ scaled_DK).to(weight.device, weight.dtype)
    result = rows_RK.reshape(*moved.shape[:-1], rows_RK.shape[1])
    return result.movedim(-1, axis).contiguous()


def rows_per_chunk(num_columns: int) -> int:
    """Return how many rows of so many float64 numbers are rotated at once."""
    return max(1, CHUNK_BYTES // (8 * num_columns))
