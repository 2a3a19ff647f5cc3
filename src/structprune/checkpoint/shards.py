"""Where the tensors of a directory lie: its index, or its single file, and what the headers of the shards say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from structprune.checkpoint.weight_source import STORED_DTYPES
from structprune.errors import CheckpointError, first_line
from structprune.files import check_regular, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Old checkpoints carry the causal mask as a buffer of bytes, and positions as one of integers; nothing needs them.
_COMPUTED = {"BOOL": ("attn.bias", "attention.bias"), "U8": ("attn.bias", "attention.bias"), "I64": ("position_ids",)}

Open = Callable[[Path], Any]
"""Opens a file of weights for its headers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says of one tensor."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def locate(directory: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Map each tensor to the file that holds it, and say what is odd about the index, a sentence each.

    Raises CheckpointError where there are no safetensors, or it is not said which ones belong together.
    """
    index_path, single_path = directory / INDEX_NAME, directory / SINGLE_NAME
    # Stock transformers prefers the single file where both are there.
    if single_path.exists():
        with open_shard(single_path, "np") as handle:
            return dict.fromkeys(handle.keys(), single_path), ()
    if index_path.exists():
        return _present(directory, _indexed(directory, index_path))
    if shards := sorted(path.name for path in directory.glob("*.safetensors")):
        raise CheckpointError(
            "the weight files have no index",
            where=str(directory),
            got=f"{shards[0]}" + (f" and {len(shards) - 1} more" if len(shards) > 1 else ""),
            wanted=f"{SINGLE_NAME}, or {INDEX_NAME} beside the shards",
            do=f"rename the file to {SINGLE_NAME}"
            if len(shards) == 1
            else f"fetch {INDEX_NAME} from where the shards are from, or save the model again with save_pretrained",
        )
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    raise CheckpointError(
        "no safetensors weights found",
        where=str(directory),
        got=pickled[0] if pickled else "none",
        wanted=f"{SINGLE_NAME} or {INDEX_NAME}",
        do="convert pickled weights with save_pretrained(safe_serialization=True) first; pickles are never loaded"
        if pickled
        else "check the path",
    )


def _indexed(directory: Path, index_path: Path) -> dict[str, Path]:
    """Read the index, an untrusted input: a shard must be a plain file name beside it."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index has no weight_map", where=str(index_path), do="download the checkpoint again")
    shards: dict[str, Path] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or file_name in ("", ".", ".."):
            raise CheckpointError(
                "the index names a shard outside its directory", where=str(index_path), got=repr(file_name)
            )
        shards[name] = directory / file_name
    return shards


def _present(directory: Path, placed: Mapping[str, Path]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Map each tensor to its shard as the shards have it: of the index, stock code uses only the list of files.

    Raises CheckpointError for a tensor that is in two shards without the index saying which one counts.
    """
    found: dict[str, Path] = {}
    for path in dict.fromkeys(placed.values()):
        with open_shard(path, "np") as handle:
            for name in set(handle.keys()):
                if name in found and placed.get(name) not in (found[name], path):
                    raise CheckpointError(
                        f"two shards hold tensor {name!r}, and the index does not say which one counts",
                        where=str(directory),
                        got=f"{found[name].name} and {path.name}",
                    )
                if name not in found or placed.get(name) == path:
                    found[name] = path
    notes: list[str] = []
    if invented := sorted(placed.keys() - found.keys()):
        notes.append(f"{INDEX_NAME} names {len(invented)} tensor(s) that no shard holds, such as {invented[0]}")
    if omitted := sorted(found.keys() - placed.keys()):
        notes.append(f"{INDEX_NAME} leaves out {len(omitted)} tensor(s) of its shards, such as {omitted[0]}")
    return found, tuple(notes)


def open_shard(path: Path, framework: Literal["pt", "np"] = "pt") -> Any:
    """Open a file of safetensors. Raises CheckpointError if it is missing, damaged or too large to be mapped.

    Headers are read as numpy: torch maps a file as private memory, which systems refuse for one larger than theirs.
    """
    try:
        check_regular(path, CheckpointError)
        return safe_open(str(path), framework=framework)
    except FileNotFoundError:
        raise CheckpointError(
            "a shard that the index names is missing", where=str(path), do="download the checkpoint again"
        ) from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            "the shard is truncated or not safetensors",
            where=str(path),
            got=str(error),
            do="download this file again",
        ) from None
    except RuntimeError as error:
        raise CheckpointError(
            "the shard cannot be mapped into memory",
            where=str(path),
            got=first_line(error),
            do="save the checkpoint in smaller shards, or allow the system to map more than its memory",
        ) from None


def read_headers(placed: Mapping[str, Path], open_file: Open) -> dict[str, Header]:
    """Read shapes and dtypes; masks and positions that stock code computes itself are left out.

    Raises CheckpointError for a tensor that is not where it is said to be, and for quantised ones.
    """
    found: dict[str, Header] = {}
    by_shard: dict[Path, list[str]] = {}
    for name, path in placed.items():
        by_shard.setdefault(path, []).append(name)
    for path, names in by_shard.items():
        with open_file(path) as handle:
            present = set(handle.keys())
            for name in names:
                if name not in present:
                    raise CheckpointError(f"the index places tensor {name!r} in a shard that lacks it", where=str(path))
                part = handle.get_slice(name)
                dtype = part.get_dtype()
                if name.endswith(_COMPUTED.get(dtype, ())):
                    continue
                if dtype not in STORED_DTYPES:
                    raise CheckpointError(
                        f"tensor {name!r} is stored quantised or as integers",
                        where=str(path),
                        got=dtype,
                        wanted=", ".join(STORED_DTYPES),
                        do="prune the unquantised checkpoint, then quantise the result",
                    )
                found[name] = Header(path=path, shape=tuple(part.get_shape()), dtype=STORED_DTYPES[dtype])
    return found
