"""Writes a planned GGUF file tensor by tensor: in memory at any time is one tensor, as stored and as written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from structprune.architectures.gguf.description import Rows
from structprune.architectures.stock.wrapper import text_view
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.readme import source_metadata
from structprune.errors import NumericalError
from structprune.exporters.export import TEXT_ALONE, Exporter, ExportRequest, ExportResult
from structprune.exporters.gguf.plan import GgufPlan, plan_gguf, stock_names
from structprune.exporters.gguf.tensors import GgufPart, GgufTensor
from structprune.files import atomic_path, make_folder
from structprune.runs.directory import check_free_disk


def export_gguf(request: ExportRequest) -> ExportResult:
    """Write the checkpoint as one GGUF file, whole or not at all. Nothing is read before all is resolved.

    Raises UnsupportedError where no architecture of llama.cpp computes the same, CheckpointError for tensors that do
    not fit together, NumericalError for a value that is not finite or that the file's dtype cannot hold.
    """
    path = request.output
    # What transformers makes of a GGUF file's tokenizer is not always that tokenizer.
    tokenizer_gguf = request.tokenizer_gguf or request.source_gguf
    if tokenizer_gguf is not None:
        request.note(f"tokenizer copied from {tokenizer_gguf}")
    view = text_view(request.reader)
    reader = stock_names(view)
    plan = plan_gguf(reader, request.dtype, tokenizer_gguf)
    if view.wrapper is not None:
        request.note(TEXT_ALONE)
    for note in plan.tokenizer.notes:
        request.note(note)
    check_free_disk(path, plan.num_bytes)
    make_folder(path.parent, "the export")
    _write(plan, reader, request)
    return ExportResult(
        format="gguf",
        path=str(path),
        architecture=plan.architecture,
        dtype=str(plan.dtype).removeprefix("torch."),
        num_tensors=len(plan.tensors),
        bytes=path.stat().st_size,
        tokenizer=str(plan.tokenizer.source),
    )


def _write(plan: GgufPlan, reader: CheckpointReader, request: ExportRequest) -> None:
    import gguf

    kinds = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    }
    writer: Any = gguf.GGUFWriter(None, plan.architecture)
    writer.add_type("model")
    writer.add_name(request.name)
    origin = source_metadata(request.reader.directory, request.reader.config)
    if isinstance(origin.get("license"), str):
        writer.add_license(origin["license"])
    writer.add_file_type(int(kinds[plan.dtype][1]))
    types = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, bool: gguf.GGUFValueType.BOOL}
    types |= {str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}
    for key, value in plan.hyperparameters.items():
        writer.add_key_value(f"{plan.architecture}.{key}", value, types[type(value)])
    for entry in plan.tokenizer.entries:
        writer.add_key_value(entry.key, entry.value, entry.type, sub_type=entry.sub_type)
    for tensor in plan.tensors:
        dtype = plan.dtype_of(tensor)
        num_bytes = torch.Size(tensor.shape).numel() * dtype.itemsize
        # numpy knows no bfloat16; the type of the file is what counts.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=kinds[dtype][0])
    request.start(len(plan.tensors))
    with atomic_path(request.output) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in plan.tensors:
                value = _value(tensor, reader, plan.dtype_of(tensor))
                writer.write_tensor_data(value.view(torch.uint8).numpy())
                del value
                request.advance(tensor.name)
        finally:
            writer.close()


def _value(tensor: GgufTensor, reader: CheckpointReader, dtype: torch.dtype) -> Tensor:
    """Compute the tensor as it is stored in the file."""
    if tensor.values is not None:
        return tensor.values.to(dtype).contiguous()
    if not tensor.sources:
        return torch.zeros(tensor.shape, dtype=dtype)
    parts: list[Tensor] = []
    for source in tensor.sources:
        part = _transformed(reader.read([source.name])[source.name], source, tensor.shape)
        low, high = part.aminmax()
        if max(-float(low), float(high)) > torch.finfo(dtype).max:
            raise NumericalError(
                f"tensor {source.name!r} holds values that {str(dtype).removeprefix('torch.')} cannot",
                wanted="--dtype bfloat16 or float32",
            )
        parts.append(part.to(dtype))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(tensor.shape).contiguous()


_ROWS: Mapping[Rows, Callable[[int], slice]] = {
    "all": lambda _: slice(None),
    "front": lambda count: slice(count // 2),
    "back": lambda count: slice(count // 2, None),
    "even": lambda _: slice(0, None, 2),
    "odd": lambda _: slice(1, None, 2),
}


def _transformed(value: Tensor, part: GgufPart, shape: tuple[int, ...]) -> Tensor:
    if part.transform in ("latent-keys", "latent-values"):
        heads = value.reshape(shape[0], -1, value.shape[-1])
        return heads[:, : shape[2]].transpose(1, 2) if part.transform == "latent-keys" else heads[:, -shape[1] :]
    if part.transform in ("delta-states", "delta-gates"):
        return _delta(value, part, shape)
    if part.tiled:
        value = _tiled(value, part)
    if part.factor is not None:
        value = value.float() * part.factor
    if part.transform == "minus-exp":
        return -torch.exp(value.float())
    value = value[_ROWS[part.rows](len(value))]
    heads, rest = part.heads, value.shape[1:]
    if part.transform == "plus-one":
        return value.float() + 1.0
    if part.transform == "transpose":
        return value.T
    if part.transform == "ungroup":
        groups = value.reshape(heads, part.queries + 2, -1, *rest)
        pieces = (groups[:, : part.queries], groups[:, part.queries], groups[:, part.queries + 1])
        return torch.cat([piece.reshape(-1, *rest) for piece in pieces])
    if part.transform == "interleave":
        # Row i of a head's first half and row i of its second half become neighbours.
        return value.reshape(heads, 2, -1, *rest).transpose(1, 2).reshape(value.shape)
    return value


def _tiled(value: Tensor, part: GgufPart) -> Tensor:
    """Put the first value head of every key head in front, then the second ones, along rows or columns."""
    if part.tiled == "columns":
        return _tiled(value.T, replace(part, tiled="rows")).T
    front, rest = value[: part.skipped], value[part.skipped :]
    apart = rest.reshape(part.heads, part.queries, -1, *rest.shape[1:]).transpose(0, 1)
    return torch.cat([front, apart.reshape(rest.shape)])


def _delta(value: Tensor, part: GgufPart, shape: tuple[int, ...]) -> Tensor:
    """Take queries, keys and values of all key heads, or the gates, from those of one key head after the other."""
    groups = value.reshape(part.heads, -1, value.shape[-1])
    if part.transform == "delta-gates":
        return groups[:, -(shape[0] // part.heads) :]
    values = groups.shape[1] - shape[0] // part.heads
    keys = groups.shape[1] // 2 - values
    pieces = groups.split([keys, keys, values, values], dim=1)[:3]
    return torch.cat([piece.reshape(-1, value.shape[-1]) for piece in pieces])


GGUF = Exporter(
    export=export_gguf, packages=("gguf",), extra="structprune[gguf]", suffix=".gguf", copies_tokenizer=True
)
