"""Matrices that are read a few rows at a time: sums, diagonal and symmetric ones, of which less is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_NUM_STRIPS = 16


class Rows(Protocol):
    """A matrix (rows, columns), by what is read of it: a tensor, or what gives its rows as tensors."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        """Return rows by a slice or by their numbers, (rows, columns). They may share memory with the matrix."""
        ...

    def to(self, device: torch.device, /) -> Rows:
        """Return the same matrix on `device`."""
        ...

    def diagonal(self) -> Tensor:
        """Return the entries (i, i), (rows,), of a square matrix."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSum:
    """A + B of two matrices of one shape, of which nothing is made but the rows that are asked for."""

    first: Rows
    second: Rows

    @property
    def shape(self) -> torch.Size:
        return self.first.shape

    @property
    def device(self) -> torch.device:
        return self.first.device

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        if isinstance(rows, slice):
            return self.first[rows] + self.second[rows]
        # A selection is a new tensor: the sum takes its place.
        return self.first[rows].add_(self.second[rows])

    def to(self, device: torch.device, /) -> RowSum:
        return RowSum(first=self.first.to(device), second=self.second.to(device))

    def diagonal(self) -> Tensor:
        return self.first.diagonal() + self.second.diagonal()


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagonalRows:
    """A diagonal matrix, of which nothing is made but the rows that are asked for."""

    values_I: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.values_I), len(self.values_I)))

    @property
    def device(self) -> torch.device:
        return self.values_I.device

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        numbers = torch.arange(len(self.values_I), device=self.device)[rows]
        found = self.values_I.new_zeros(len(numbers), len(self.values_I))
        return found.scatter_(1, numbers[:, None], self.values_I[numbers][:, None])

    def to(self, device: torch.device, /) -> DiagonalRows:
        return DiagonalRows(values_I=self.values_I.to(device))

    def diagonal(self) -> Tensor:
        return self.values_I


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricRows:
    """A symmetric matrix by its upper triangle, in strips of rows that begin at the diagonal: half a square."""

    strips: tuple[Tensor, ...]
    """(rows of the strip, columns from its first row on)."""

    @classmethod
    def of(cls, matrix_II: Tensor) -> SymmetricRows:
        """Copy the upper triangle of a matrix."""
        step = max(1, -(-len(matrix_II) // _NUM_STRIPS))
        starts = range(0, len(matrix_II), step)
        return cls(strips=tuple(matrix_II[start : start + step, start:].clone() for start in starts))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.strips[0].shape[1],) * 2)

    @property
    def device(self) -> torch.device:
        return self.strips[0].device

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        numbers = torch.arange(self.shape[0], device=self.device)[rows]
        found = self.strips[0].new_empty(len(numbers), self.shape[1])
        start = 0
        for strip in self.strips:
            stop = start + len(strip)
            own = (numbers >= start) & (numbers < stop)
            found[own, start:] = strip[numbers[own] - start]
            later = numbers >= stop
            found[later, start:stop] = strip[:, numbers[later] - start].T
            start = stop
        return found

    def to(self, device: torch.device, /) -> SymmetricRows:
        return SymmetricRows(strips=tuple(strip.to(device) for strip in self.strips))

    def diagonal(self) -> Tensor:
        return torch.cat([strip.diagonal() for strip in self.strips])
