"""Stock transformers loads a finished checkpoint, and its logits are compared with those of the run that wrote it.

    python -m structprune.evaluation.reload SPEC RESULT

is the process that does it: a fresh one, so nothing of the run is left that could stand in for what is on disk. SPEC is
a ReloadSpec as JSON; RESULT, a ReloadResult, appears when it is done.

Shape suffixes: S positions, V vocabulary.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from structprune.architectures.stock.loading import (
    check_runs_ours_only,
    has_own_modeling_file,
    without_global_width_warnings,
)
from structprune.architectures.stock.placeholders import parameters_on_meta
from structprune.architectures.stock.wrapper import auto_class, is_wrapper_type, module_names
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import StructPruneError, first_line
from structprune.files import read_json, write_text
from structprune.memory import PeakMeter

_RESULT_NAME = "reload-result.json"


class ReloadSpec(BaseModel):
    """What the process is to do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: Path
    probe: Path
    """safetensors with `ids_S` and `logits_SV`, the run's own, float32."""
    mode: Literal["whole", "streamed"]
    """whole: `from_pretrained`; streamed: the same classes, with each module's weights read when it runs."""
    dtype: str


class ReloadResult(BaseModel):
    """How far the logits are apart, or why there are none."""

    error: str | None = None
    """The checkpoint does not load, or not all of it."""
    impossible: str | None = None
    """The streamed mode cannot run this model; that says nothing about the checkpoint."""
    relative_difference: float = 0.0
    """|a - b| / |b| over all logits, each position's mean taken off; b is the run's own."""
    max_abs_difference: float = 0.0
    same_top1: float = 0.0
    """Share of the positions with the same likeliest token."""
    peak_bytes: int = 0
    """Peak memory of the process that loads the checkpoint, above its size with the libraries imported."""


class ProcessEndedError(Exception):
    """The process ended without a result, by a signal or an exception of its own."""


def reload_in_a_process(spec: ReloadSpec, work: Path) -> ReloadResult:
    """Start the process and wait for it; `work` takes its files. Raises ProcessEndedError, KeyboardInterrupt."""
    spec_path, result_path = work / "reload.json", work / _RESULT_NAME
    write_text(spec_path, spec.model_dump_json())
    # Modules of an earlier checkpoint of this name must not be taken for this one's.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
    command = [sys.executable, "-m", "structprune.evaluation.reload", str(spec_path), str(result_path)]
    # A group of its own: Ctrl-C reaches this process alone, which then ends the other wherever it is.
    process = subprocess.Popen(
        command, process_group=0, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode != 0:
        if process.returncode < 0:
            raise ProcessEndedError(f"signal {-process.returncode} (out of memory?)")
        raise ProcessEndedError((errors.strip() or f"exit code {process.returncode}").splitlines()[-1])
    return ReloadResult.model_validate_json(result_path.read_text(encoding="utf-8"))


def reload_here(spec: ReloadSpec) -> ReloadResult:
    """Load the checkpoint and compute its logits in this process. Errors of the loader are part of the result."""
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, spec.dtype)
    try:
        own = has_own_modeling_file(spec.directory)
        if own:
            check_runs_ours_only(spec.directory)
        # Without weights; the classes count as libraries.
        model = _empty_model(spec.directory, dtype, own)
        with PeakMeter() as meter:
            probe = load_file(spec.probe)
            model = (
                _whole(spec.directory, dtype, own) if spec.mode == "whole" else _streamed(spec.directory, dtype, model)
            )
            with torch.no_grad():
                logits_SV = model(input_ids=probe["ids_S"][None], use_cache=False).logits[0].float()
            return _compared(logits_SV, probe["logits_SV"]).model_copy(update={"peak_bytes": meter.peak_so_far()})
    except _NotStreamableError as error:
        return ReloadResult(impossible=str(error))
    except Exception as error:
        # Any failure of the stock loader means the same: the checkpoint is not what it should be.
        text = str(error) if isinstance(error, StructPruneError) else f"{type(error).__name__}: {first_line(error)}"
        return ReloadResult(error=text)


def _compared(found_SV: Tensor, wanted_SV: Tensor) -> ReloadResult:
    difference_SV = found_SV - wanted_SV
    scale = (wanted_SV - wanted_SV.mean(dim=-1, keepdim=True)).norm()
    centred = (difference_SV - difference_SV.mean(dim=-1, keepdim=True)).norm()
    return ReloadResult(
        # NaN is not JSON, and no logits are as bad as wrong ones.
        error=None if torch.isfinite(found_SV).all() else "the logits are NaN or infinite",
        relative_difference=float((centred / scale).nan_to_num(0.0, 0.0, 0.0)),
        max_abs_difference=float(difference_SV.abs().max().nan_to_num(0.0, 0.0, 0.0)),
        same_top1=float((found_SV.argmax(-1) == wanted_SV.argmax(-1)).float().mean()),
    )


def _auto_class(directory: Path) -> Any:
    return auto_class(read_json(directory / "config.json").get("model_type"))


def _whole(directory: Path, dtype: torch.dtype, own: bool) -> Any:
    """Load the model as a user does; our own modelling file, and no other, may run."""
    with without_global_width_warnings():
        loaded: Any = _auto_class(directory).from_pretrained(
            str(directory), dtype=dtype, local_files_only=True, trust_remote_code=own, output_loading_info=True
        )
    model, info = loaded
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(name) or ())):
            raise ValueError(f"{len(keys)} {name.replace('_', ' ')}, first {keys[0]}")
    return model.eval()


# Modules around a text model, which text does not pass, may be made of tensors in other ways: they stay empty.
class _NotStreamableError(Exception):
    """The model's parameters are not the checkpoint's tensors one to one."""


def _empty_model(directory: Path, dtype: torch.dtype, own: bool) -> Any:
    """Build the model as stock code does, without storage for its parameters."""
    with without_global_width_warnings(), parameters_on_meta():
        config: Any = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        return _auto_class(directory).from_config(config, dtype=dtype, trust_remote_code=own).eval()


def _streamed(directory: Path, dtype: torch.dtype, model: Any) -> Any:
    """Let the modules of the empty model read their tensors from the files whenever code asks for one."""
    reader = CheckpointReader(directory)
    wraps = is_wrapper_type(reader.config.get("model_type"))
    # The files of causal models have today's names, those of image-text models the ones of their source.
    stored = {own: name for name, own in module_names(model, reader.shapes).items()} if wraps else {}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # Tied parameters are one object under several names, of which the checkpoint has one.
        if (place := stored.get(name) if wraps else name) in reader.shapes:
            names[id(parameter)] = place
    for prefix, module in model.named_modules():
        sources: dict[str, str] = {}
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            own = stored.get(full) if wraps else full
            source = own if own in reader.shapes else names.get(id(parameter))
            if source is None and not wraps:
                raise _NotStreamableError(f"no tensor of the checkpoint is {full}")
            if source is not None:
                sources[name] = source
        for name, _ in module.named_buffers(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if (own := stored.get(full) if wraps else full) in reader.shapes:
                sources[name] = own
        if sources:
            _read_when_asked(module, reader, sources, dtype)
    return model


def _read_when_asked(
    module: nn.Module, reader: CheckpointReader, sources: Mapping[str, str], dtype: torch.dtype
) -> None:
    """Make a module's tensors those of the checkpoint, read anew for each use: some are used by a module around it."""
    stock_class: Any = type(module)

    def read(self: Any, name: str) -> Any:
        source = sources.get(name)
        if source is None:
            return stock_class.__getattr__(self, name)
        return reader.read([source], dtype=dtype)[source]

    module.__class__ = type(stock_class.__name__, (stock_class,), {"__getattr__": read})


def main() -> None:
    """Run the reload check that the first argument specifies, and write its result: the entry point of the process."""
    spec = ReloadSpec.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    write_text(Path(sys.argv[2]), reload_here(spec).model_dump_json())


if __name__ == "__main__":
    main()
