"""Reads a Hugging Face directory of safetensors: headers first, tensors one by one, never the whole model.

Weights may also lie in a GGUF file, which answers as an open safetensors file does (gguf_weights.py).
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from structprune.checkpoint.folder import check_folder, check_names_no_code, read_files
from structprune.checkpoint.renaming import Labels, Renaming, Starts
from structprune.checkpoint.shards import locate, open_shard, read_headers
from structprune.checkpoint.stacked import Place, Stacking
from structprune.checkpoint.weight_source import FewerTokens, MergedAdapter, WeightSource, names_by_bytes
from structprune.checkpoint.wrapper import Wrapper
from structprune.errors import CheckpointError, NumericalError
from structprune.files import read_json
from structprune.types import Around

_CHUNK_BYTES = 16 * 2**20


class CheckpointReader:
    """Lazy view of a checkpoint directory with one or many shards, or with `weights` that lie elsewhere.

    Raises CheckpointError when the configuration, the index or a shard is missing, truncated or inconsistent.
    """

    def __init__(self, directory: Path, weights: WeightSource | None = None, *, beside_adapter: bool = False) -> None:
        self.directory = directory
        self.adapter: MergedAdapter | None = None
        """What is merged into the weights."""
        self.fewer_tokens: FewerTokens | None = None
        """What is left out of the vocabulary."""
        self.wrapper: Wrapper | None = None
        """What this is the text model of; None: it is a checkpoint of its own."""
        self.weights = weights
        self.width: torch.dtype | None = None
        """The dtype that every tensor is read in; None: each in its own."""
        check_folder(directory, with_adapter=beside_adapter)
        self.config = read_json(directory / "config.json", do="every Hugging Face checkpoint has a config.json")
        self.source_config = self.config
        """config.json as it is in the files."""
        check_names_no_code(self.config, str(directory / "config.json"))
        self._pieces: dict[str, tuple[Stacking, Place]] = {}
        placed, self.notes = self._locate()
        """What was found in the files that a person should know, a sentence each."""
        # One after the other.
        self._renamings: list[Renaming] = []
        headers = read_headers(placed, partial(self._open, framework="np"))
        self._shard_of = {name: header.path for name, header in headers.items()}
        self.shapes = {name: header.shape for name, header in headers.items()}
        self._stored_dtypes = {name: header.dtype for name, header in headers.items()}

    def _locate(self) -> tuple[dict[str, Path], tuple[str, ...]]:
        if self.weights is None:
            return locate(self.directory)
        return {name: self.weights.path_of(name) for name in self.weights}, ()

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Tensor -> the dtype that it is read in."""
        return self._stored_dtypes if self.width is None else dict.fromkeys(self._stored_dtypes, self.width)

    def in_width(self, dtype: torch.dtype) -> CheckpointReader:
        """Return the same checkpoint with every tensor in `dtype`."""
        view = copy.copy(self)
        view.width = dtype
        view.weights = None if self.weights is None else self.weights.in_width(dtype)
        return view

    def renamed(self, prefixes: Mapping[str, str]) -> CheckpointReader:
        """Return a view with other names: the first of `prefixes`, stored -> wanted, that fits is exchanged."""
        return self._with(Starts(prefixes))

    def relabelled(self, names: Mapping[str, str]) -> CheckpointReader:
        """Return a view with other names, stored -> wanted, for the tensors that are there under a stored one."""
        return self._with(Labels(names))

    def _with(self, renaming: Renaming) -> CheckpointReader:
        view = copy.copy(self)
        view._renamings = [*self._renamings, renaming]
        view._shard_of = {renaming.wanted(name): path for name, path in self._shard_of.items()}
        view.shapes = {renaming.wanted(name): shape for name, shape in self.shapes.items()}
        view._stored_dtypes = {renaming.wanted(name): dtype for name, dtype in self._stored_dtypes.items()}
        return view

    def with_config(self, config: dict[str, Any]) -> CheckpointReader:
        """Return the same checkpoint with another config."""
        view = copy.copy(self)
        view.config = config
        return view

    def part(self, wrapper: Wrapper, prefixes: Mapping[str, str]) -> CheckpointReader:
        """Return a view of the text model alone, its names and config those of a checkpoint of its own."""
        view = self.without(wrapper.around).renamed(prefixes).with_config(dict(wrapper.text_config))
        view.wrapper = wrapper
        return view

    def beside(self, directory: Path) -> CheckpointReader:
        """Return a reader of `directory`, whose tensors have the names of this one's files and this one's names here.

        Where this is the text model of a larger checkpoint, so is that one, with nothing around it.
        """
        other = CheckpointReader(directory)
        if self.wrapper is not None:
            for renaming in self._renamings:
                other = other._with(renaming)
        return other

    @property
    def around(self) -> Around:
        """What the files hold beside this model, where it is the text model of a larger one."""
        if self.wrapper is None:
            return Around()
        whole, names = self.wrapper.whole, self.wrapper.around
        return Around(
            parameters=sum(torch.Size(whole.shapes[name]).numel() for name in names),
            num_bytes=whole.num_bytes(names),
            dtypes=frozenset(whole.dtypes[name] for name in names),
        )

    def as_stored(self) -> CheckpointReader:
        """Return the same checkpoint with every tensor in its own dtype."""
        view = copy.copy(self)
        view.width = None
        return view

    def output_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json of a checkpoint whose model has `config`: that of the whole where this is a part."""
        return dict(config) if self.wrapper is None else self.wrapper.embedded(config)

    def without(self, names: Iterable[str]) -> CheckpointReader:
        """Return the same checkpoint without these tensors."""
        view, left_out = copy.copy(self), set(names)
        view._shard_of = {name: path for name, path in self._shard_of.items() if name not in left_out}
        view.shapes = {name: shape for name, shape in self.shapes.items() if name not in left_out}
        view._stored_dtypes = {name: dtype for name, dtype in self._stored_dtypes.items() if name not in left_out}
        return view

    def unstacked(self, stacking: Stacking) -> CheckpointReader:
        """Return the same checkpoint with the tensors of single experts where files hold those of all in one."""
        view, pieces = copy.copy(self), dict(self._pieces)
        view._shard_of, view.shapes = dict(self._shard_of), dict(self.shapes)
        view._stored_dtypes = dict(self._stored_dtypes)
        for name, shape in self.shapes.items():
            parts = list(stacking.parts_of(name, shape))
            if not parts:
                continue
            path, dtype = view._shard_of.pop(name), view._stored_dtypes.pop(name)
            del view.shapes[name]
            for part, place, part_shape in parts:
                pieces[part] = stacking, place
                view._shard_of[part], view._stored_dtypes[part], view.shapes[part] = path, dtype, part_shape
        view._pieces = pieces
        return view

    def stored_name(self, name: str) -> str:
        """Return the tensor's name in the files, whether it is there or not."""
        for renaming in reversed(self._renamings):
            name = renaming.stored(name)
        return name

    def open_slice(self, name: str) -> Any:
        """Return a tensor as the file has it, of which rows can be read. Raises CheckpointError as reading does."""
        return self._open(self._shard_of[name]).get_slice(self.stored_name(name))

    def path_of(self, name: str) -> Path:
        """Return the file that holds the tensor."""
        return self._shard_of[name]

    def _open(self, path: Path, framework: Literal["pt", "np"] = "pt") -> Any:
        return open_shard(path, framework) if self.weights is None else self.weights

    def num_bytes(self, names: Iterable[str]) -> int:
        """Count the bytes that the named tensors take as they are read."""
        return sum(torch.Size(self.shapes[name]).numel() * self._dtype(name).itemsize for name in names)

    def dtype_names(self, names: Iterable[str]) -> list[str]:
        """Name the dtypes that the named tensors are read in, that of the most bytes first."""
        return names_by_bytes((self._dtype(name), self.num_bytes([name])) for name in names)

    def _dtype(self, name: str) -> torch.dtype:
        return self.width or self._stored_dtypes[name]

    @property
    def file_bytes(self) -> int:
        """Bytes of all weight files on disk."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def files(self) -> list[Path]:
        """All files of weights."""
        if self.wrapper is not None:
            return self.wrapper.whole.files
        return sorted(set(self._shard_of.values())) if self.weights is None else list(self.weights.paths)

    @property
    def scratch_bytes(self) -> int:
        """What reading holds beside the tensor that is read, at most, where weights are not read as they are stored."""
        if self.weights is not None:
            return self.weights.scratch_bytes
        # Rows in the common width, on their way from the file.
        return 0 if self.width is None else 2 * _CHUNK_BYTES

    @property
    def num_files(self) -> tuple[int, int]:
        """How many files hold the weights, and how many there should be by their own names (`-00001-of-00003`)."""
        names = {path.name for path in self._shard_of.values()}
        announced = [int(match[1]) for name in names if (match := re.search(r"-of-(\d{1,5})\.", name))]
        return len(names), max(announced, default=len(names))

    @property
    def weight_files(self) -> set[str]:
        """Names of the files in the directory that the weights are made of."""
        if self.wrapper is not None:
            return self.wrapper.whole.weight_files
        made_of = [] if self.weights is None else [*self.weights.paths, *self.weights.content_files]
        return {path.name for path in self._shard_of.values()} | {
            path.name for path in made_of if path.parent == self.directory
        }

    def read(self, names: Iterable[str], prefix: str = "", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Read tensors by name, `prefix` added to each, as private copies in `dtype`, or in that of `dtypes`.

        Another dtype is cast to as the file is read, so that the tensor is in memory once. Raises CheckpointError for a
        missing name and NumericalError for a value that is not finite in the file, or that float16 cannot hold.
        """
        wanted = list(names)
        tensors: dict[str, Tensor] = {}
        by_shard: dict[Path, list[str]] = {}
        for name in wanted:
            full = prefix + name
            if full not in self._shard_of:
                raise CheckpointError(f"the checkpoint lacks tensor {full!r}", where=str(self.directory))
            by_shard.setdefault(self._shard_of[full], []).append(name)
        for path, short_names in by_shard.items():
            handle = self._open(path)
            for name in short_names:
                stored = self._stored_dtypes[prefix + name]
                tensor = torch.empty(self.shapes[prefix + name], dtype=dtype or self.width or stored)
                for start, stop in _row_chunks(tensor.shape, max(stored.itemsize, tensor.itemsize)):
                    # Pages of the file's mapping stay resident as long as the handle lives: reopened per chunk.
                    handle = handle or self._open(path)
                    rows = self._rows(handle, prefix + name, start, stop)
                    rows = self._in_width(rows, prefix + name, path)
                    _check_finite(rows, prefix + name, path, tensor.dtype)
                    if stop is None:
                        tensor.copy_(rows)
                    else:
                        tensor[start:stop] = rows
                        handle = None
                    del rows
                tensors[name] = tensor
        return tensors

    def _rows(self, handle: Any, name: str, start: int, stop: int | None) -> Tensor:
        """Read rows start..stop of a tensor, all of it without a stop, as the file's mapping has them."""
        piece = self._pieces.get(name)
        if piece is None:
            part = handle.get_slice(self.stored_name(name))
            return part[...] if stop is None else part[start:stop]
        stacking, place = piece
        return stacking.read_rows(handle.get_slice(self.stored_name(place.stacked)), place, start, stop)

    def read_rows(self, name: str, num_rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, private copy of the rows from there), at most `num_rows` at a time, in order.

        Raises CheckpointError for a missing name and NumericalError as `read` does.
        """
        if name not in self._shard_of:
            raise CheckpointError(f"the checkpoint lacks tensor {name!r}", where=str(self.directory))
        path = self._shard_of[name]
        for start in range(0, self.shapes[name][0], num_rows):
            # Pages of the file's mapping stay resident as long as the handle lives: reopened per chunk.
            stop = min(start + num_rows, self.shapes[name][0])
            rows = self._rows(self._open(path), name, start, stop)
            _check_finite(rows, name, path, self._dtype(name))
            yield start, rows.to(self._dtype(name), copy=True)

    def _in_width(self, rows: Tensor, name: str, path: Path) -> Tensor:
        """Round rows to the dtype that all tensors are read in; what is computed with is then what is written."""
        if self.width is None or rows.dtype == self.width:
            return rows
        _check_finite(rows, name, path, self.width)
        return rows.to(self.width)

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers in the same dtype; reads up to the first difference."""
        stored = self._stored_dtypes
        if self.shapes[name] != self.shapes[other] or stored[name] != stored[other]:
            return False
        for start, stop in _row_chunks(torch.Size(self.shapes[name]), stored[name].itemsize):
            first, second = (self._rows(self._open(self._shard_of[n]), n, start, stop) for n in (name, other))
            if not torch.equal(first, second):
                return False
        return True

    def fingerprint(self) -> str:
        """Hash with SHA-256 the config, the tensor names and shapes, and each shard's size (not its content).

        It is that of the files: what is read of them in another width, or with a corrected config, has the same.
        """
        if self.wrapper is not None:
            return self.wrapper.whole.fingerprint()
        digest = hashlib.sha256(json.dumps(self.source_config, sort_keys=True).encode())
        for name in sorted(self.shapes, key=self.stored_name):
            digest.update(f"{self.stored_name(name)}{self.shapes[name]}{self._stored_dtypes[name]}".encode())
        for path in self.files:
            digest.update(f"{path.name}{path.stat().st_size}".encode())
        if self.weights is not None:
            digest.update(self.weights.content.encode())
        return digest.hexdigest()

    @property
    def content_files(self) -> list[Path]:
        """Everything that an output depends on: weights, config and the tokenizer's files."""
        more = () if self.weights is None else self.weights.content_files
        return [*self.files, *read_files(self.directory), *more]


def _row_chunks(shape: torch.Size, item_bytes: int) -> list[tuple[int, int | None]]:
    """Split a tensor into row ranges of about 16 MiB; one without an end if it is smaller than two of them."""
    num_bytes = shape.numel() * item_bytes
    if num_bytes <= 2 * _CHUNK_BYTES or not shape:
        return [(0, None)]
    rows = max(1, shape[0] * _CHUNK_BYTES // num_bytes)
    return [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def _check_finite(tensor: Tensor, name: str, path: Path, wanted: torch.dtype) -> None:
    """Raise NumericalError for a value that is not finite in the file, or would not be in the dtype `wanted`."""
    if tensor.numel() == 0:
        return
    # Extremes carry NaN and infinity along, and need no temporary of the tensor's size as isfinite does.
    low, high = tensor.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise NumericalError(
            f"tensor {name!r} holds NaN or infinity",
            where=str(path),
            do="the source checkpoint is damaged; download it again",
        )
    largest, limit = max(-float(low), float(high)), torch.finfo(wanted).max
    if largest > limit:
        raise NumericalError(
            f"tensor {name!r} holds values that {str(wanted).removeprefix('torch.')} cannot",
            where=str(path),
            got=f"{largest:.6g}",
            wanted=f"at most {limit:.6g}",
            do="ask for bfloat16 or float32 (--output-dtype, --dtype)",
        )
