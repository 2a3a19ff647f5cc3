"""The survey of the dense model, measured here or taken over from another run that measured the same."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.calibration.select import fingerprint
from structprune.engine.job import Job
from structprune.engine.observer import Observer
from structprune.engine.survey import Costs, survey, survey_scores
from structprune.files import write_text
from structprune.memory import PeakMeter
from structprune.report.schema import ReusedStatistics

_COSTS_NAME = "costs.safetensors"
_DONE_NAME = "survey.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """What the survey found, and where its sensitivities are."""

    costs: Costs
    folder: Path
    reused: ReusedStatistics | None = None
    """What it took the run that measured it; None if this one did."""


def surveyed(job: Job, folder: Path, meter: PeakMeter, observer: Observer) -> Surveyed:
    """Measure into `folder`, or with `job.shared` into a place where later runs of the same question find it."""
    measure = survey if job.method.survey == "loss" else survey_scores
    if job.shared is None:
        return Surveyed(costs=measure(job, folder, observer), folder=folder)
    folder = job.shared / _key(job)
    done = folder / _DONE_NAME
    if done.exists():
        reused = ReusedStatistics.model_validate_json(done.read_text(encoding="utf-8"))
        observer.note(f"the dense model's measurements are taken over from an earlier run ({reused.seconds:.0f} s)")
        return Surveyed(
            costs=_unpacked(job, load_file(str(folder / _COSTS_NAME))),
            folder=folder,
            reused=reused,
        )
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    job.shared.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    costs = measure(job, partial, observer)
    save_file(_packed(costs), str(partial / _COSTS_NAME))
    spent = ReusedStatistics(seconds=time.perf_counter() - started, peak_bytes=meter.peak_so_far())
    write_text(partial / _DONE_NAME, spent.model_dump_json())
    partial.rename(folder)
    return Surveyed(costs=costs, folder=folder)


def _key(job: Job) -> str:
    """Hash of everything that the survey depends on."""
    recipe = job.recipe
    question = {
        "source": job.reader.fingerprint(),
        "windows": fingerprint(job.windows),
        "survey": job.method.survey,
        "score": job.score if job.method.survey == "scores" else None,
        "kinds": job.kinds,
        "head_units": recipe.head_units,
        "damping": job.damping,
        "sensitivity_samples": recipe.sensitivity_samples,
        "seed": recipe.seed,
        "dtype": str(job.dtype),
        "device": str(job.device),
    }
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]


def _packed(costs: Costs) -> dict[str, Tensor]:
    return {f"{kind}.{index}": cost_U for kind, blocks in costs.items() for index, cost_U in enumerate(blocks)}


def _unpacked(job: Job, tensors: dict[str, Tensor]) -> Costs:
    return {kind: [tensors[f"{kind}.{index}"] for index in range(len(job.stock.layout.blocks))] for kind in job.kinds}
