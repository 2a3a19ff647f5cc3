"""Writes the shards of a run, and says which weight files they make; these come last, so nothing unfinished loads."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.checkpoint.shards import INDEX_NAME
from structprune.checkpoint.stacked import Shape, Stacking
from structprune.checkpoint.weight_files import StoredTensor, WeightFiles, stored_tensors
from structprune.errors import NumericalError
from structprune.files import atomic_path, write_json

_ADDED_NAME = "added.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileForm:
    """How a model's tensors lie in the files of a checkpoint."""

    name: Callable[[str], str] = str
    """A tensor's name in the model -> in the files."""
    stacking: Stacking | None = None
    """How the experts' tensors are stacked; None: each is one of its own."""

    def file_name(self, name: str) -> str:
        """Return the name of the tensor in the files that holds a tensor of the model."""
        place = None if self.stacking is None else self.stacking.place(name)
        return self.name(name if place is None else place.stacked)

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors as they are written."""
        stacked = tensors if self.stacking is None else self.stacking.stack(tensors)
        return {self.name(name): tensor for name, tensor in stacked.items()}

    def stored_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes of the tensors as they are written."""
        stacked = shapes if self.stacking is None else self.stacking.stacked_shapes(shapes)
        return {self.name(name): shape for name, shape in stacked.items()}

    def given(self, stored: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Return the model's tensors `names` out of what was written."""
        found: dict[str, Tensor] = {}
        for name in names:
            place = None if self.stacking is None else self.stacking.place(name)
            if place is None or self.stacking is None:
                found[name] = stored[self.name(name)]
            else:
                found[name] = self.stacking.take(stored[self.name(place.stacked)], place)
        return found


class CheckpointWriter:
    """Shards 1..num_shards of one checkpoint, in `folder`. Each shard appears whole and synced, or not at all.

    They are a run's own, one per block, so that it can go on from any of them; `weight_files` are made of them.
    `form` is how the tensors lie in the files.
    """

    def __init__(self, folder: Path, num_shards: int, form: FileForm | None = None) -> None:
        self.num_shards = num_shards
        self._folder = folder
        self._form = FileForm() if form is None else form
        self._tensors: dict[int, list[StoredTensor]] = {}

    def path(self, number: int) -> Path:
        """Name the file of shard `number` (from 1)."""
        return self._folder / f"shard-{number:05d}.safetensors"

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write one shard and return its path. Tensors are stored in the dtype they have.

        Raises NumericalError for a value that is not finite, as where a weight that was solved passes float16.
        """
        for name, tensor in tensors.items():
            _check_finite(self._form.name(name), tensor)
        path = self.path(number)
        with atomic_path(path) as temporary:
            save_file(
                {name: value.contiguous() for name, value in self._form.stored(tensors).items()},
                str(temporary),
                metadata={"format": "pt"},
            )
        self.adopt(number)
        return path

    def adopt(self, number: int) -> None:
        """Count a shard that is there whole, for example from an earlier process."""
        self._tensors[number] = stored_tensors(self.path(number))

    def read(self, number: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the tensors `names` of a shard that was written."""
        return self._form.given(load_file(self.path(number)), names)

    def remove(self) -> None:
        """Remove the shards, of this process and of those before it."""
        for number in range(1, self.num_shards + 1):
            self.path(number).unlink(missing_ok=True)

    def link(self, directory: Path, added: Mapping[str, Tensor] | None = None) -> None:
        """Make a checkpoint of the shards in `directory`, by links and an index: it takes no space.

        The tensors `added`, which no shard has, lie in a file of their own.
        """
        places: dict[str, str] = {}
        if added:
            named = self._form.stored(added)
            save_file(named, str(directory / _ADDED_NAME), metadata={"format": "pt"})
            places.update(dict.fromkeys(named, _ADDED_NAME))
        for number, tensors in self._tensors.items():
            path = self.path(number)
            os.link(path, directory / path.name)
            places.update((tensor.name, path.name) for tensor in tensors)
        write_json(directory / INDEX_NAME, {"metadata": {}, "weight_map": places})

    @property
    def num_parameters(self) -> int:
        """Parameters in all shards so far."""
        return self._parameters_of(self._tensors)

    def weight_files(self, max_shard_bytes: int, around: Iterable[StoredTensor] = ()) -> WeightFiles:
        """Plan the files that the shards make, once they are all there: one where `max_shard_bytes` allow it.

        The tensors `around`, of other files, are copied behind them.
        """
        in_order = [tensor for number in sorted(self._tensors) for tensor in self._tensors[number]]
        return WeightFiles.of([*in_order, *around], max_shard_bytes)

    def _parameters_of(self, numbers: Iterable[int]) -> int:
        return sum(tensor.num_parameters for number in numbers for tensor in self._tensors[number])


class ModelWriter(CheckpointWriter):
    """A checkpoint with one shard of its embeddings, one of each block, and one of what lies behind the blocks.

    `blocks_module` is the name of the list of blocks; the tensors of a block are given and read by their names in it.
    """

    def __init__(self, folder: Path, num_blocks: int, blocks_module: str, form: FileForm | None = None) -> None:
        super().__init__(folder, num_blocks + 2, form)
        self._blocks_module = blocks_module

    def beside(self, folder: Path, shards: Iterable[int] | None = None) -> Self:
        """Return a writer of others in `folder`, with links to these shards: those around the blocks unless said."""
        other = copy.copy(self)
        other._folder, other._tensors = folder, {}
        for number in (1, self.num_shards) if shards is None else shards:
            other.path(number).unlink(missing_ok=True)
            os.link(self.path(number), other.path(number))
            other.adopt(number)
        return other

    def write_embeddings(self, tensors: Mapping[str, Tensor]) -> Path:
        """Write what lies in front of the blocks, under the model's names; the file."""
        return self.write(1, tensors)

    def adopt_embeddings(self) -> None:
        """Count what lies in front of the blocks, which an earlier process wrote whole."""
        self.adopt(1)

    def write_block(self, index: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write block `index` (from 0, in this checkpoint); the file."""
        prefix = self._prefix(index)
        return self.write(_of_block(index), {prefix + name: t for name, t in tensors.items()})

    def adopt_block(self, index: int) -> None:
        """Count a block that an earlier process wrote whole."""
        self.adopt(_of_block(index))

    def read_block(self, index: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the tensors `names` of a block that was written."""
        prefix = self._prefix(index)
        tensors = self.read(_of_block(index), [prefix + name for name in names])
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def write_rest(self, tensors: Mapping[str, Tensor]) -> Path:
        """Write what lies behind the blocks, under the model's names; the file."""
        return self.write(self.num_shards, tensors)

    @property
    def num_block_parameters(self) -> int:
        """Parameters in the blocks so far."""
        blocks = [number for number in self._tensors if 1 < number < self.num_shards]
        return self._parameters_of(blocks)

    def _prefix(self, index: int) -> str:
        return f"{self._blocks_module}.{index}."


def _of_block(index: int) -> int:
    """Return the number of a block's shard: the first one is that of the embeddings."""
    return index + 2


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        return
    low, high = tensor.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        narrow = tensor.dtype == torch.float16
        raise NumericalError(
            f"tensor {name!r} of the result "
            + ("holds values that float16 cannot" if narrow else "holds NaN or infinity"),
            do="ask for --output-dtype bfloat16 or float32" if narrow else "raise --damping",
        )
