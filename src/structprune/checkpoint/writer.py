"""Writes a Hugging Face checkpoint shard by shard; the index comes last, so an unfinished directory cannot load."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.checkpoint.reader import INDEX_NAME
from structprune.files import atomic_path, write_json


class CheckpointWriter:
    """Shards 1..num_shards of one checkpoint. Each shard appears whole and synced, or not at all.

    `stored_name` gives the names in the files.
    """

    def __init__(self, directory: Path, num_shards: int, stored_name: Callable[[str], str] = str) -> None:
        self.directory = directory
        self.num_shards = num_shards
        self._stored_name = stored_name
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0
        self._num_parameters: dict[str, int] = {}

    def shard_name(self, number: int) -> str:
        """File name of shard `number` (from 1), by the convention of the hub."""
        return f"model-{number:05d}-of-{self.num_shards:05d}.safetensors"

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> str:
        """Write one shard and return its file name. Tensors are stored in the dtype they have."""
        name = self.shard_name(number)
        tensors = {self._stored_name(key): value for key, value in tensors.items()}
        with atomic_path(self.directory / name) as temporary:
            save_file(
                {key: value.contiguous() for key, value in tensors.items()}, str(temporary), metadata={"format": "pt"}
            )
        for key, value in tensors.items():
            self._count(name, key, value.numel(), value.numel() * value.element_size())
        return name

    def adopt(self, number: int) -> None:
        """Count a shard that an earlier process wrote whole."""
        name = self.shard_name(number)
        with (self.directory / name).open("rb") as handle:
            # The format: eight bytes of length, then the names, shapes and places as JSON.
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for key, entry in header.items():
            if key != "__metadata__":
                first, last = entry["data_offsets"]
                self._count(name, key, math.prod(entry["shape"]), last - first)

    def read(self, number: int, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors `names` of a shard that was written."""
        stored = load_file(self.directory / self.shard_name(number))
        return {name: stored[self._stored_name(name)] for name in names}

    def _count(self, shard: str, key: str, num_parameters: int, num_bytes: int) -> None:
        self._weight_map[key] = shard
        self._total_bytes += num_bytes
        self._num_parameters[shard] = self._num_parameters.get(shard, 0) + num_parameters

    @property
    def num_parameters(self) -> int:
        """Parameters in all shards so far."""
        return sum(self._num_parameters.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files written so far."""
        return sum((self.directory / name).stat().st_size for name in set(self._weight_map.values()))

    def withdraw(self) -> None:
        """Take the index away again, so that nothing loads the directory."""
        (self.directory / INDEX_NAME).rename(self.directory / f"{INDEX_NAME}.rejected")

    def finish(self) -> None:
        """Write the index. Call once, after every shard and every other file of the checkpoint."""
        write_json(
            self.directory / INDEX_NAME,
            {
                "metadata": {"total_size": self._total_bytes, "total_parameters": self.num_parameters},
                "weight_map": dict(sorted(self._weight_map.items())),
            },
        )


class ModelWriter(CheckpointWriter):
    """A checkpoint with one shard of its embeddings, one of each block, and one of what lies behind the blocks.

    `blocks_module` is the name of the list of blocks; the tensors of a block are given and read by their names in it.
    """

    def __init__(
        self, directory: Path, num_blocks: int, blocks_module: str, stored_name: Callable[[str], str] = str
    ) -> None:
        super().__init__(directory, num_blocks + 2, stored_name)
        self._blocks_module = blocks_module

    def write_embeddings(self, tensors: Mapping[str, Tensor]) -> Path:
        """Write what lies in front of the blocks, under the model's names; the file."""
        return self.directory / self.write(1, tensors)

    def adopt_embeddings(self) -> None:
        """Count what lies in front of the blocks, which an earlier process wrote whole."""
        self.adopt(1)

    def write_block(self, index: int, tensors: Mapping[str, Tensor]) -> Path:
        """Write block `index` (from 0, in this checkpoint); the file."""
        prefix = self._prefix(index)
        return self.directory / self.write(_of_block(index), {prefix + name: t for name, t in tensors.items()})

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
        return self.directory / self.write(self.num_shards, tensors)

    @property
    def num_block_parameters(self) -> int:
        """Parameters in the blocks so far."""
        return sum(self._num_parameters.get(self.shard_name(number), 0) for number in range(2, self.num_shards))

    def _prefix(self, index: int) -> str:
        return f"{self._blocks_module}.{index}."


def _of_block(index: int) -> int:
    """Return the number of a block's shard: the first one is that of the embeddings."""
    return index + 2
