"""The whole model as one ONNX graph, by the exporter that transformers ships: token ids and a mask in, logits out.

The graph takes any batch and length, and keeps no keys and values between calls: it scores texts, and generates only by
computing the whole text for every token. Unlike elsewhere in this package the model is loaded whole, in float32,
because tracing runs it. ONNX Runtime computes some logits before the output takes its name.

Shape suffixes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structprune.architectures.stock.loading import load_model
from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.folder import carry_over, sort_files
from structprune.errors import NumericalError, UnsupportedError, first_line
from structprune.exporters.export import TEXT_ALONE, Exporter, ExportRequest, ExportResult
from structprune.files import make_folder, whole_folder
from structprune.runs.directory import check_free_disk

GRAPH_NAME = "model.onnx"
# |a - b| / |b| over all logits: that of the reload check in float32.
_TOLERANCE = 1e-3
# Rotary positions that change with the length of the text; a trace would keep those of the length that it saw.
_BY_LENGTH = ("dynamic", "longrope")
# Neither is the shape that is traced, so both of its axes are seen to be free.
_TRACED, _CHECKED = (2, 8), ((3, 19), (1, 1))


def export_onnx(request: ExportRequest) -> ExportResult:
    """Write `model.onnx`, its weights beside it and the tokenizer's files into the new directory `request.output`.

    Raises UnsupportedError for what has no such form, InputError for settings that this format does not have, and
    NumericalError where ONNX Runtime computes other logits than the model. Nothing half-written stays.
    """
    _check(request)
    output = request.output
    # Float32, whatever the checkpoint is stored in, beside the graph itself.
    num_values = sum(torch.Size(shape).numel() for shape in request.reader.shapes.values())
    check_free_disk(output, 4 * num_values)
    request.start(3)
    model = load_model(request.reader, torch.device("cpu"), torch.float32)
    request.advance("load")
    make_folder(output.parent, "the export")
    with whole_folder(output) as staging:
        _trace(model, staging)
        request.advance("trace")
        _check_logits(model, staging)
        request.advance("compare")
        source = request.reader.directory
        files = sort_files(source, request.reader.weight_files)
        carry_over(source, staging, files)
        for name, reason in files.left_out.items():
            request.note(f"{name} is left out: {reason}")
    return ExportResult(
        format="onnx",
        path=str(output),
        architecture=type(model).__name__,
        dtype="float32",
        num_tensors=len(list(model.parameters())),
        bytes=sum(path.stat().st_size for path in output.iterdir()),
        tokenizer=str(request.reader.directory),
    )


def _check(request: ExportRequest) -> None:
    reader = request.reader
    # Families, quantised sources and damaged ones, by headers.
    stock = StockModel(reader)
    if stock.reader.wrapper is not None:
        request.note(TEXT_ALONE)
    by_length = sorted(_rope_types(stock.config).intersection(_BY_LENGTH))
    if by_length:
        raise UnsupportedError(
            "one graph cannot hold rotary positions that change with the length of the text",
            where=str(reader.directory / "config.json"),
            got=f"rope_type {', '.join(by_length)}",
        )
    stored = {str(dtype).removeprefix("torch.") for dtype in reader.dtypes.values()}
    if request.dtype == "stored" and stored != {"float32"}:
        raise UnsupportedError(
            "ONNX files are written in float32",
            got=", ".join(sorted(stored)),
            do="pass --dtype float32",
        )


def _rope_types(config: Any) -> set[str]:
    """Collect the rotary types of all layers; families with several kinds of attention have parameters for each."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [part for part in parameters.values() if part]
    return {kind["rope_type"] for kind in kinds}


def _trace(model: Any, directory: Path) -> None:
    """Write the graph of `model`. Raises UnsupportedError with the exporter's reason."""
    from torch.export import Dim
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    axes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs = _inputs(model, _TRACED)
    traced: dict[str, Any] = {**inputs, "use_cache": False}
    config = OnnxConfig(dynamic_shapes=dict.fromkeys(inputs, axes))
    with _quiet():
        try:
            exported = OnnxExporter().export(model, traced, config=config)
            exported.save_pretrained(directory)
        except Exception as error:
            # The exporter raises many types; all of them say that this model has no such graph.
            raise UnsupportedError(
                "the exporter of transformers cannot trace this model",
                got=f"{type(error).__name__}: {first_line(error)}",
            ) from error


def _check_logits(model: Any, directory: Path) -> None:
    """Raise NumericalError if ONNX Runtime computes others than `model`."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(directory / GRAPH_NAME), providers=["CPUExecutionProvider"])
    for shape in _CHECKED:
        inputs = _inputs(model, shape)
        with torch.no_grad():
            expected_BSV: Tensor = model(**inputs, use_cache=False).logits
        (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        difference = float((torch.from_numpy(found) - expected_BSV).norm() / expected_BSV.norm())
        if not difference <= _TOLERANCE:
            raise NumericalError(
                "ONNX Runtime computes other logits from the graph than transformers from the checkpoint",
                got=f"a relative difference of {difference:.2g}",
                wanted=f"at most {_TOLERANCE:g}",
            )


def _inputs(model: Any, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Draw random tokens, (B, S), with a mask that lets all of them be seen."""
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Suppress the notes that torch and transformers print and log while they trace."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


ONNX = Exporter(
    export=export_onnx,
    packages=("onnx", "onnxscript", "onnxruntime"),
    extra="structprune[onnx]",
    dtypes=("float32",),
)
