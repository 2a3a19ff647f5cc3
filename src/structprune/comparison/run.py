"""Run the cells of a comparison that are not there yet, one process each, and keep the table up to date."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.model import StockModel
from structprune.assess.split import decided_for_a_check
from structprune.calibration.sources.file import read_text
from structprune.comparison.cell import CellResult, CellSpec, cell_name
from structprune.comparison.cells import (
    Variant,
    cell_key,
    cell_recipe,
    common_recipe,
    file_sha256,
    fitted,
    shared_settings,
)
from structprune.engine.resolve import check_planned
from structprune.engine.run.calibration import renderer
from structprune.engine.run.device import resolve_device, resolve_dtype
from structprune.errors import InputError, StructPruneError
from structprune.files import check_path, make_folder, write_json, write_text
from structprune.memory import unbounded_environment
from structprune.methods import METHODS
from structprune.observer import Observer
from structprune.recipe import Recipe
from structprune.report.comparison_page import COMPARISON_PAGE_NAME, comparison_page
from structprune.report.plots import check_matplotlib, plot_comparison
from structprune.results.comparison import RESULT_NAME, Comparison, Failure, TextInfo
from structprune.texts import AUTO, shown_texts

CSV_NAME = "comparison.csv"
_WORK_NAME = "work"
_KEPT_NAME = "checkpoints"
_MARK_NAME = ".structprune"
_SHARED_NAME = "shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRequest:
    """What to compare, and on what."""

    model: str
    shared: Mapping[str, Any]
    """Recipe fields that all cells share where the method has them; method and sparsity do not count."""
    cells: Sequence[tuple[Variant, float | None]]
    """Methods, each with a share that it is to remove; None where limits decide."""
    texts: Sequence[Path]
    seq_len: int = 2048
    """Tokens per evaluation window."""
    max_windows: int | None = None
    time_it: bool = True
    plots: bool = True
    keep: bool = False
    """Whether the pruned checkpoints stay, in `checkpoints/`."""
    quiet: bool = False


def compare(request: ComparisonRequest, output: Path, observer: Observer) -> Comparison:
    """Fill `output` with the table of `request`: `comparison.json`, `.csv`, `.html` and the curves.

    Every cell is checked before the first one runs. Cells that `comparison.json` already holds are not run again; it
    is rewritten after each, so an interrupted comparison goes on where it was. A cell that fails is named in the
    result, and the others go on. Raises StructPruneError.
    """
    if request.plots:
        check_matplotlib()
    check_path(output, "the comparison")
    _check_ours(output)
    for label, flags in shared_settings(request.shared, [variant for variant, _ in request.cells]).items():
        observer.note(f"{', '.join(flags)}: no meaning for {label}, left out there")
    comparison, cells = _prepare(request)
    make_folder(output, "the comparison")
    with _locked(output):
        comparison = _resumed(comparison, cells, output)
        done = {cell.key for cell in comparison.cells}
        missing = [spec for spec in cells if spec.key not in done]
        if len(missing) < len(cells):
            observer.note(f"{len(cells) - len(missing)} of {len(cells)} cells are in {output / RESULT_NAME} already")
        if comparison.dense is None:
            missing.insert(0, cells[0].model_copy(update={"recipe": None, "label": "dense", "sparsity": None}))
        for number, spec in enumerate(missing, start=1):
            observer.note(f"[{number}/{len(missing)}] {spec.name}")
            result = _in_processes(spec, output, keep=request.keep)
            comparison = _added(comparison, result)
            if result.failure is not None:
                observer.note(f"failed: {result.failure.error}")
            _write(comparison, output)
        # An interrupted comparison keeps it: what the cells share is there when it goes on.
        shutil.rmtree(output / _WORK_NAME, ignore_errors=True)
        if request.plots and comparison.cells:
            plot_comparison(comparison, output)
    return comparison


def _prepare(request: ComparisonRequest) -> tuple[Comparison, list[CellSpec]]:
    """Build the empty table and its cells, all of them resolved. Raises StructPruneError."""
    asked_of_all = common_recipe(request.shared)
    device = resolve_device(asked_of_all.device)
    dtype = str(resolve_dtype(asked_of_all, device)).removeprefix("torch.")
    # Measured once: cells whose forward passes differ in precision would not be comparable.
    shared = {**request.shared, "dtype": dtype, "device": str(device)}
    texts = [(path.name, path) for path in request.texts]
    if len({label for label, _ in texts}) < len(texts):
        raise InputError(
            "two texts have the same file name", got=", ".join(label for label, _ in texts), do="rename one"
        )
    reader = open_model(request.model, adapter=asked_of_all.merge_adapter)
    for _, path in texts:
        read_text(path, renderer(reader))
    layout = StockModel(reader).layout
    identity: dict[str, Any] = {
        "source": reader.fingerprint(),
        "texts": {label: file_sha256(path) for label, path in texts},
        "seq_len": request.seq_len,
        "max_windows": request.max_windows,
        "bos": asked_of_all.bos,
    }
    cells: list[CellSpec] = []
    for variant, sparsity in request.cells:
        asked = cell_recipe(shared, variant, sparsity)
        recipe = fitted(asked, METHODS.get(variant.method).in_pipeline(asked.pipeline), layout)
        _check_cell(request.model, recipe, variant.label, sparsity)
        key = cell_key(recipe, identity)
        spec = CellSpec(
            step="test",
            model=request.model,
            label=variant.label,
            key=key,
            recipe=recipe,
            sparsity=sparsity,
            scope=asked.scope,
            texts=texts,
            seq_len=request.seq_len,
            max_windows=request.max_windows,
            bos=asked_of_all.bos,
            merge_adapter=asked_of_all.merge_adapter,
            device=str(device),
            dtype=dtype,
            time_it=request.time_it,
            output=Path(_checkpoint_name(variant, sparsity)),
            shared=Path(_SHARED_NAME),
            quiet=request.quiet,
        )
        if key not in {cell.key for cell in cells}:
            cells.append(spec)
    calibration = shown_texts(asked_of_all.calibration)
    comparison = Comparison(
        model=Path(request.model).name,
        source_fingerprint=identity["source"],
        calibration="chosen by each run" if calibration == AUTO else calibration,
        texts=[TextInfo(label=label, sha256=digest) for label, digest in identity["texts"].items()],
        seq_len=request.seq_len,
        max_windows=request.max_windows,
        dtype=dtype,
        device=str(device),
    )
    return comparison, cells


def _check_cell(model: str, recipe: Recipe, label: str, sparsity: float | None) -> None:
    """Raise, with the cell's name, what its run would raise before its first weight: also that it does not fit."""
    try:
        check_planned(model, decided_for_a_check(model, recipe))
    except StructPruneError as error:
        raise type(error)(
            error.what,
            where=cell_name(label, sparsity) + (f", {error.where}" if error.where else ""),
            got=error.got,
            wanted=error.wanted,
            do=error.do,
        ) from None


def _checkpoint_name(variant: Variant, sparsity: float | None) -> str:
    safe = "".join(c if c.isalnum() or c in "-._" else "-" for c in variant.label)
    return safe if sparsity is None else f"{safe}-{sparsity:g}"


@contextlib.contextmanager
def _locked(output: Path) -> Generator[None]:
    """Raise InputError if another process fills the same directory."""
    with (output / ".lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                "another process is filling this directory", where=str(output), do="wait for it, or choose another -o"
            ) from None
        yield


def _resumed(fresh: Comparison, cells: Sequence[CellSpec], output: Path) -> Comparison:
    """Complete the table with what an earlier run left. Raises InputError if that was another comparison."""
    path = output / RESULT_NAME
    if not path.exists():
        return fresh
    try:
        found = Comparison.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise InputError(
            "the earlier result cannot be read", where=str(path), got=str(error).splitlines()[0], do="move it away"
        ) from None
    for name in ("source_fingerprint", "calibration", "texts", "seq_len", "max_windows", "dtype", "device"):
        if getattr(found, name) != getattr(fresh, name):
            raise InputError(
                f"the directory holds a comparison with another {name.replace('_', ' ')}",
                where=str(path),
                got=_shown(getattr(fresh, name)),
                wanted=_shown(getattr(found, name)),
                do="choose another -o",
            )
    labels = {spec.key: spec.label for spec in cells}
    return found.model_copy(
        update={
            "failures": [],
            # The same cell may go by another name now.
            "cells": [c.model_copy(update={"label": labels.get(c.key, c.label)}) for c in found.cells],
        }
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{text.label} ({text.sha256[:8]})" for text in value)
    return str(value)


def _in_processes(spec: CellSpec, output: Path, *, keep: bool) -> CellResult:
    """Run the cell's steps and wait for them. Raises KeyboardInterrupt if they were interrupted."""
    work = output / _WORK_NAME
    _made_here(work)
    folder = output / _KEPT_NAME if keep else work
    _made_here(folder)
    checkpoint = folder / spec.output
    _discard(checkpoint)
    spec = spec.model_copy(update={"output": checkpoint, "shared": work / _SHARED_NAME})
    result = CellResult()
    try:
        if spec.recipe is not None:
            result = _in_a_process(spec.model_copy(update={"step": "prune"}), work)
        if result.failure is None:
            result = _in_a_process(spec, work)
    except BaseException:
        _discard(checkpoint)
        raise
    if not keep or result.failure is not None:
        _discard(checkpoint)
    return result


def _check_ours(output: Path) -> None:
    """Raise InputError where folders that a comparison empties are there already and are not a comparison's."""
    if (output / RESULT_NAME).is_file():
        # Read before anything is removed, and refused if it is none of ours.
        return
    for name in (_WORK_NAME, _KEPT_NAME):
        folder = output / name
        if os.path.lexists(folder) and not (folder / _MARK_NAME).is_file():
            raise InputError(
                "a folder that a comparison would use is there already", where=str(folder), do="choose another -o"
            )


def _made_here(folder: Path) -> None:
    """Make the folder, marked as a comparison's own."""
    folder.mkdir(exist_ok=True)
    (folder / _MARK_NAME).touch()


def _in_a_process(spec: CellSpec, work: Path) -> CellResult:
    spec_path, result_path = work / "cell.json", work / "result.json"
    result_path.unlink(missing_ok=True)
    write_text(spec_path, spec.model_dump_json())
    command = [sys.executable, "-m", "structprune.cli.cell", str(spec_path), str(result_path)]
    # A group of its own: Ctrl-C reaches this process alone, which then ends the other wherever it is.
    process = subprocess.Popen(command, process_group=0, env=unbounded_environment())
    try:
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if code == 0:
        return CellResult.model_validate_json(result_path.read_text(encoding="utf-8"))
    reason = f"signal {-code} (out of memory?)" if code < 0 else f"exit code {code}"
    return CellResult(
        failure=Failure(label=spec.label, sparsity=spec.sparsity, error=f"the process ended with {reason}")
    )


def _discard(checkpoint: Path) -> None:
    """Remove what an unfinished cell left."""
    for path in (checkpoint, _partial(checkpoint)):
        shutil.rmtree(path, ignore_errors=True)


def _partial(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.partial")


def _added(comparison: Comparison, result: CellResult) -> Comparison:
    if result.dense is not None:
        return comparison.model_copy(update={"dense": result.dense})
    if result.cell is not None:
        return comparison.model_copy(update={"cells": [*comparison.cells, result.cell]})
    assert result.failure is not None
    return comparison.model_copy(update={"failures": [*comparison.failures, result.failure]})


def _write(comparison: Comparison, output: Path) -> None:
    write_json(output / RESULT_NAME, comparison.model_dump(mode="json"))
    write_text(output / CSV_NAME, comparison.to_csv())
    write_text(output / COMPARISON_PAGE_NAME, comparison_page(comparison))
