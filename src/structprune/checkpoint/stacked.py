"""Tensors of single experts that lie stacked in files: (experts, rows, columns), or (experts, rows) of their biases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor of one expert lies."""

    stacked: str
    expert: int
    part: int
    """How many other maps' rows come before, as many of each."""
    parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacking:
    """How the tensors of experts are stacked."""

    module: str
    """End of the name of the module that holds the experts by their numbers."""
    maps: Mapping[str, Sequence[str]]
    """Stacked tensor -> tensors of one expert whose rows lie there one after the other, as many of each."""
    transposed: bool = False
    """Whether matrices are stored with rows for columns."""

    def place(self, name: str) -> Place | None:
        """Find where a tensor of one expert lies; None for any other tensor."""
        found = re.fullmatch(rf"((?:.*\.)?{re.escape(self.module)})\.(\d+)\.(.+)", name)
        if found is None:
            return None
        where, number, inner = found.groups()
        for stacked, names in self.maps.items():
            if inner in names:
                return Place(
                    stacked=f"{where}.{stacked}", expert=int(number), part=list(names).index(inner), parts=len(names)
                )
        return None

    def parts_of(self, name: str, shape: Shape) -> Iterable[tuple[str, Place, Shape]]:
        """Yield (tensor of one expert, its place, its shape) for all that lie in a stacked tensor; none in others."""
        where, _, last = name.rpartition(".")
        if last not in self.maps or not f".{where}".endswith(f".{self.module}") or len(shape) not in (2, 3):
            return
        names = self.maps[last]
        sizes = self._turned(shape[1:])
        for expert in range(shape[0]):
            for part, inner in enumerate(names):
                place = Place(stacked=name, expert=expert, part=part, parts=len(names))
                yield f"{where}.{expert}.{inner}", place, (sizes[0] // len(names), *sizes[1:])

    def stacked_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes of the tensors in files, from those of the experts' own; others are passed through."""
        result: dict[str, Shape] = {}
        for name, shape in shapes.items():
            place = self.place(name)
            if place is None:
                result[name] = shape
                continue
            before = result.get(place.stacked, (0,))
            whole = self._turned((shape[0] * place.parts, *shape[1:]))
            result[place.stacked] = (max(before[0], place.expert + 1), *whole)
        return result

    def stack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors as they lie in files; those of experts are copied, others passed through."""
        shapes = self.stacked_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        result: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            place = self.place(name)
            if place is None:
                result[name] = tensor
                continue
            if place.stacked not in result:
                result[place.stacked] = tensor.new_empty(shapes[place.stacked])
            self._part(result[place.stacked], place).copy_(tensor)
        return result

    def take(self, stacked: Tensor, place: Place) -> Tensor:
        """Return one expert's tensor out of a stacked one, contiguous."""
        return self._part(stacked, place).contiguous()

    def _part(self, stacked: Tensor, place: Place) -> Tensor:
        own = stacked[place.expert]
        own = own.T if self.transposed and own.ndim == 2 else own
        rows = own.shape[0] // place.parts
        return own[place.part * rows : (place.part + 1) * rows]

    def read_rows(self, opened: Any, place: Place, start: int, stop: int | None) -> Tensor:
        """Read rows of one expert's tensor, all of them without a stop, from a stacked one that is open.

        `opened` has a shape and gives slices, as safetensors does.
        """
        shape = self._turned(tuple(opened.get_shape()[1:]))
        rows = shape[0] // place.parts
        first = place.part * rows
        wanted = slice(first + start, first + (rows if stop is None else stop))
        if self.transposed and len(shape) == 2:
            return opened[place.expert, :, wanted].T
        return opened[place.expert, wanted]

    def _turned(self, shape: Shape) -> Shape:
        return shape[::-1] if self.transposed and len(shape) == 2 else shape
