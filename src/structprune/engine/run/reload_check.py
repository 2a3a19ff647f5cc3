"""The last question of every run: does stock code, in a fresh process, get the run's own logits from the files?

Shape suffixes: S positions, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from safetensors.torch import save_file
from torch import Tensor

from structprune.checkpoint.weight_files import WeightFiles
from structprune.engine.planning.reload import RELOAD_TOKENS, ReloadMode
from structprune.engine.run.context import RunContext
from structprune.engine.streaming.model import StreamedModel
from structprune.errors import CheckpointError
from structprune.evaluation import reload as stock_reload
from structprune.observer import Observer
from structprune.results.schema import ReloadReport
from structprune.runs.directory import RunDirectory

# By the coarser of the dtypes that the weights are stored in and that the forward passes run in.
_TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The start of the calibration text, and what the pruned model predicted on it."""

    ids_S: Tensor
    logits_SV: Tensor
    """Float32, on the host."""


def check_reload(
    model: StreamedModel, run: RunDirectory, files: WeightFiles, probe: Probe | None, observer: Observer
) -> ReloadReport:
    """Load the finished checkpoint in a process of its own and compare its logits with `probe`.

    Raises CheckpointError if it does not load or predicts otherwise; it is left as `OUT.rejected`, its weights renamed.
    """
    if probe is None:
        return ReloadReport(mode="off", reason="--no-reload-check")
    started = time.perf_counter()
    bound = model.plan.reload
    assert bound is not None, "planned wherever a probe is taken"
    mode = bound.mode(files.num_parameters, files.num_bytes, model.plan.budget_bytes)
    reason = "" if mode == "whole" else "the whole model does not fit in what is left of --memory"
    observer.start("reload check", 1)
    result, mode, ended = _ask(model, run, files, probe, mode)
    if ended:
        reason = f"loading the whole model ended with {ended}"
    if result.impossible is not None:
        observer.advance(f"not possible: {result.impossible}")
        return ReloadReport(mode="impossible", reason=f"{reason}; {result.impossible}")
    tolerance = _tolerance(model)
    if result.error is not None:
        raise _rejected(run, files, result.error, "a checkpoint that loads", said="cannot be loaded by it")
    if not result.relative_difference <= tolerance:
        raise _rejected(
            run,
            files,
            f"a relative difference of {result.relative_difference:.2g}, the largest of one logit "
            f"{result.max_abs_difference:.2g}",
            f"at most {tolerance:g}",
        )
    observer.advance(f"{mode}, relative difference {result.relative_difference:.1e}")
    return ReloadReport(
        mode=mode,
        reason=reason,
        num_positions=len(probe.ids_S),
        relative_difference=result.relative_difference,
        tolerance=tolerance,
        max_abs_difference=result.max_abs_difference,
        same_top1=result.same_top1,
        planned_bytes=bound.bytes(mode, files.num_parameters, files.num_bytes),
        peak_bytes=result.peak_bytes,
        seconds=time.perf_counter() - started,
    )


def _ask(
    model: StreamedModel, run: RunDirectory, files: WeightFiles, probe: Probe, mode: ReloadMode
) -> tuple[stock_reload.ReloadResult, ReloadMode, str]:
    """Run the reload process; return its result, its mode, and what ended the first try if there were two.

    A process with the whole model may have needed more memory than there was, which is not the checkpoint's fault: it
    is tried module by module then.
    """
    work = run.staging / "reload"
    work.mkdir(exist_ok=True)
    save_file({"ids_S": probe.ids_S, "logits_SV": probe.logits_SV}, work / "probe.safetensors")
    spec = stock_reload.ReloadSpec(
        directory=run.checkpoint,
        probe=work / "probe.safetensors",
        mode=mode,
        dtype=str(model.dtype).removeprefix("torch."),
    )
    tries: list[ReloadMode] = ["whole", "streamed"] if mode == "whole" else ["streamed"]
    ended = ""
    for attempt in tries:
        try:
            result = stock_reload.reload_in_a_process(spec.model_copy(update={"mode": attempt}), work)
            return result, attempt, ended
        except stock_reload.ProcessEndedError as error:
            ended = str(error)
    raise _rejected(run, files, f"a process that ended with {ended}", "its logits")


def take_probe(context: RunContext, ids_S: Tensor, logits_SV: Tensor) -> Probe | None:
    """Take the first positions of a window, or None if the recipe wants no check."""
    if not context.recipe.reload_check:
        return None
    return Probe(ids_S=ids_S[:RELOAD_TOKENS].clone(), logits_SV=logits_SV[:RELOAD_TOKENS].float().cpu().clone())


def _tolerance(model: StreamedModel) -> float:
    dtypes = {model.dtype, *model.reader.dtypes.values()}
    return max(_TOLERANCES.get(str(dtype).removeprefix("torch."), 0.0) for dtype in dtypes)


def _rejected(
    run: RunDirectory, files: WeightFiles, got: str, wanted: str, said: str = "predicts otherwise than the run did"
) -> CheckpointError:
    """Take the output back and mark it; the error to raise."""
    files.withdraw(run.checkpoint)
    rejected = run.reject({"got": got, "wanted": wanted})
    return CheckpointError(
        f"the written checkpoint, given to stock code in a process of its own, {said}",
        where=str(rejected),
        got=got,
        wanted=wanted,
        do="see whether stock code loads the source here; if it does, run this again on a sound disk. The directory, "
        "whose weights are renamed, is kept to be looked at, and --no-reload-check leaves this check out",
    )
