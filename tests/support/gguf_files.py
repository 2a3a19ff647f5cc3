"""GGUF files written by the gguf package itself: copies of a file with other keys, tensors or types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Tensors = dict[str, np.ndarray[Any, Any]]


def copy_gguf(
    source: Path,
    target: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    change: Callable[[Tensors], Any] | None = None,
    quantise: gguf.GGMLQuantizationType | None = None,
    architecture: str | None = None,
    keep: Callable[[str], bool] | None = None,
    rounded: gguf.GGMLQuantizationType | None = None,
    tensors_per_file: int = 0,
) -> Path:
    """`source` again: with `keys` (None takes one away), after `change` of its float32 tensors, matrices quantised.

    `rounded` are matrices that are quantised and dequantised again. `keep` chooses tensors by name. With
    `tensors_per_file` the file is split, and the first part returned. A key's value is a pair (value, gguf type) where
    its type does not follow from it.
    """
    reader: Any = gguf.GGUFReader(str(source))
    writer: Any = gguf.GGUFWriter(
        None, architecture or reader.get_field("general.architecture").contents(), split_max_tensors=tensors_per_file
    )
    wanted = dict(keys or {})
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in wanted:
            continue
        sub_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
    for key, value in wanted.items():
        if value is not None:
            value, kind = value if isinstance(value, tuple) else (value, None)
            writer.add_key_value(key, value, kind or gguf.GGUFValueType.get_type(value))
    tensors: Tensors = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]).copy()
        for tensor in reader.tensors
    }
    if change is not None:
        change(tensors)
    for name, value in tensors.items():
        if keep is not None and not keep(name):
            continue
        in_blocks = value.ndim > 1 and "position" not in name and value.shape[-1] % 32 == 0
        if quantise is not None and in_blocks:
            writer.add_tensor(name, gguf.quantize(value, quantise), raw_dtype=quantise)
        elif rounded is not None and in_blocks:
            writer.add_tensor(name, gguf.dequantize(gguf.quantize(value, rounded), rounded))
        else:
            writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target if not tensors_per_file else sorted(target.parent.glob(f"{target.stem}-00001-of-*.gguf"))[0]


def plain_gguf(path: Path, architecture: str) -> None:
    """A readable GGUF file with one tensor and no metadata but the architecture."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.ones((8, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
