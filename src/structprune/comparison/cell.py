"""One cell of a comparison: prune, then test and time, each in a process of its own (`cli/cell.py`).

The first keeps to the bounds that pruning promises its memory by; in the second stock code runs as it would anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, SerializeAsAny

from structprune.api import prune
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.config import max_positions
from structprune.architectures.stock.wrapper import text_view
from structprune.assess import load_with_tokenizer
from structprune.calibration.sources.file import read_text
from structprune.comparison.cells import settings_of
from structprune.engine.run.calibration import window_start
from structprune.engine.run.device import DTYPES, machine
from structprune.engine.run.finalize import load_report
from structprune.errors import StructPruneError
from structprune.evaluation.perplexity import make_reference, perplexity, text_bytes, text_windows
from structprune.evaluation.speed import SpeedResult, speed_pair
from structprune.kinds import StartToken
from structprune.observer import Observer
from structprune.recipe import Recipe, flag_name
from structprune.recipe.limits import targets_of
from structprune.results.comparison import Cell, DenseRow, Failure, Speed, TextScore
from structprune.results.report import PruneReport


class CellSpec(BaseModel):
    """What one process is to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["prune", "test"]
    """`test` finds in `output` what `prune` left there."""

    model: str
    label: str
    key: str
    recipe: SerializeAsAny[Recipe] | None
    """None: only the dense model is tested."""
    sparsity: float | None
    """Asked share of the parameters in `scope`; a method without units takes as many from all of the blocks. None:
    limits decide, or it is the dense model."""
    scope: str
    texts: list[tuple[str, Path]]
    """Label and file."""
    seq_len: int
    max_windows: int | None
    bos: StartToken
    merge_adapter: str
    device: str
    dtype: str
    time_it: bool
    output: Path
    """Directory of the pruned checkpoint."""
    shared: Path
    """Where measurements of the dense model wait for the next cell."""
    quiet: bool

    @property
    def name(self) -> str:
        """What people call it."""
        return cell_name(self.label, self.sparsity)


def cell_name(label: str, sparsity: float | None) -> str:
    """Name a cell by its method and share; the dense model, and cells whose limits decide, have none."""
    return label if sparsity is None else f"{label} at {sparsity:.4g}"


class CellResult(BaseModel):
    """What it found: one of the three, or none where it had only to prune."""

    dense: DenseRow | None = None
    cell: Cell | None = None
    failure: Failure | None = None


def run_cell(spec: CellSpec, observer: Observer) -> CellResult:
    """Prune and test by `spec`. An error of the input or the numbers becomes a failure, anything else is raised."""
    try:
        if spec.recipe is None:
            return CellResult(dense=_dense_row(spec))
        if spec.step == "test":
            return CellResult(cell=_cell(spec, spec.recipe, load_report(spec.output)))
        # The test that follows loads the result with stock code, and times are compared.
        prune(spec.model, spec.recipe.model_copy(update={"reload_check": False}), spec.output, observer, spec.shared)
        return CellResult()
    except StructPruneError as error:
        return CellResult(failure=Failure(label=spec.label, sparsity=spec.sparsity, error=str(error)))


def _dense_row(spec: CellSpec) -> DenseRow:
    reader = text_view(open_model(spec.model, adapter=spec.merge_adapter))
    model, encoder = load_with_tokenizer(spec.model, torch.device(spec.device), DTYPES[spec.dtype], spec.merge_adapter)
    start = window_start(encoder, spec.bos)
    limit = max_positions(model.config)
    texts: list[TextScore] = []
    for label, path in spec.texts:
        windows_NS = text_windows(
            limit, encoder, read_text(path, encoder.render), label, spec.seq_len, spec.max_windows, start
        )
        found = perplexity(model, windows_NS, label).over_text(text_bytes(encoder, windows_NS))
        texts.append(_text_score(label, found))
    return DenseRow(
        parameters=sum(parameter.numel() for parameter in model.parameters()) + reader.around.parameters,
        bytes=reader.file_bytes,
        texts=texts,
    )


def _cell(spec: CellSpec, recipe: Recipe, report: PruneReport) -> Cell:
    device, dtype = torch.device(spec.device), DTYPES[spec.dtype]
    dense, encoder = load_with_tokenizer(spec.model, device, dtype, spec.merge_adapter)
    pruned, own_encoder = load_with_tokenizer(spec.output, device, dtype)
    tokens = None if report.vocabulary is None else report.vocabulary.after
    if tokens is not None:
        # The same text in other tokens: windows are others, and so are the predictions.
        encoder = own_encoder
    start = window_start(encoder, spec.bos)
    limit = max_positions(dense.config)
    texts: list[TextScore] = []
    for label, path in spec.texts:
        windows_NS = text_windows(
            limit, encoder, read_text(path, encoder.render), label, spec.seq_len, spec.max_windows, start
        )
        reference = make_reference(dense, windows_NS) if tokens is None else None
        found = perplexity(pruned, windows_NS, label, reference=reference)
        texts.append(_text_score(label, found.over_text(text_bytes(encoder, windows_NS))))
    reused_seconds = report.reused.seconds if report.reused else 0.0
    speed = _speed(speed_pair({"dense": dense, "pruned": pruned}, repeats=3)) if spec.time_it else None
    return Cell(
        key=spec.key,
        label=spec.label,
        method=recipe.method,
        sparsity=report.size.removed_share_of_scope if spec.sparsity is None else spec.sparsity,
        limits=", ".join(f"{flag_name(name)[2:]} {value}" for name, value in targets_of(recipe).items()),
        scope=spec.scope,
        settings=settings_of(recipe),
        tokens=tokens,
        parameters=report.size.parameters_after,
        nonzero_parameters=None if report.zeros is None else report.zeros.nonzero_parameters,
        bytes=report.size.bytes_after,
        removed_share_of_scope=report.size.removed_share_of_scope,
        removed_share_of_blocks=report.size.removed_share_of_blocks,
        removed_share_of_model=report.size.removed_share_of_model,
        texts=texts,
        speed=speed,
        wall_seconds=report.wall_seconds + reused_seconds,
        shared_seconds=reused_seconds,
        planned_peak_bytes=report.memory.planned_peak_bytes,
        measured_peak_bytes=max(report.memory.measured_peak_bytes, report.reused.peak_bytes if report.reused else 0),
        calibration_windows=report.calibration.num_windows,
        compute_dtype=report.compute_dtype,
        kept={
            kind: [block.kept_units for block in report.blocks if block.kind == kind]
            for kind in dict.fromkeys(block.kind for block in report.blocks)
        },
        machine=machine(),
        versions=report.versions,
    )


def _text_score(label: str, result: Any) -> TextScore:
    return TextScore(
        text=label,
        perplexity=result.perplexity,
        kl_to_dense=result.kl_to_reference,
        top1_agreement=result.top1_agreement,
        num_windows=result.num_windows,
        bits_per_byte=result.bits_per_byte,
    )


def _speed(results: dict[str, SpeedResult]) -> Speed:
    dense, pruned = results["dense"], results["pruned"]
    prefill, decode = pruned.ratios(dense)
    return Speed(
        prefill_tokens_per_s=pruned.prefill_tokens_per_s,
        decode_tokens_per_s=pruned.decode_tokens_per_s,
        prefill_speedup=prefill,
        decode_speedup=decode,
        prompt_tokens=pruned.prompt_tokens,
        decoded_tokens=pruned.decoded_tokens,
    )
