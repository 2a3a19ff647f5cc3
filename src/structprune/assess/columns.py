"""Everything that is measured of a few models, a column each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from structprune.assess.quality import EvaluationRequest, evaluate_all, generate
from structprune.assess.speed import SpeedRequest, bench
from structprune.memory import unbounded_environment
from structprune.observer import Observer, SilentObserver
from structprune.results.measured import Bench, Evaluation
from structprune.results.side_by_side import ModelColumn


def side_by_side(
    models: Mapping[str, str | Path],
    prompt: str,
    quality: EvaluationRequest,
    speed: SpeedRequest,
    *,
    max_new_tokens: int = 32,
    observer: Observer | None = None,
) -> list[ModelColumn]:
    """Measure size, perplexities, speed and the answer to `prompt` of each model, under its name.

    Models are timed in turn, in a process of their own, and the speeds are those of the first point of `speed`. Raises
    StructPruneError.
    """
    observer = observer or SilentObserver()
    observer.start("measure", len(models) + 1)
    measured: dict[str, tuple[Evaluation, str]] = {}
    for name, model in models.items():
        found = evaluate_all(model, quality)
        measured[name] = found, generate(model, prompt, max_new_tokens=max_new_tokens, dtype=quality.dtype)
        observer.advance(f"{name}: " + ", ".join(f"{one.text} {one.perplexity:.2f}" for one in found.texts))
    first, *others = models.values()
    timed = _timed(first, speed, others).models
    observer.advance("speed")
    return [
        ModelColumn(
            name=name,
            parameters=rates.parameters,
            file_bytes=rates.file_bytes,
            perplexities={one.text: one.perplexity for one in found.texts},
            prefill_tokens_per_s=rates.points[0].prefill.median,
            decode_tokens_per_s=rates.points[0].decode.median,
            says=says,
        )
        for (name, (found, says)), rates in zip(measured.items(), timed, strict=True)
    ]


def _timed(first: str | Path, speed: SpeedRequest, others: Sequence[str | Path]) -> Bench:
    """Time the models in a process without the bounds that a run sets on what libraries keep: those cost speed."""
    bounds = {name: os.environ.pop(name) for name in os.environ.keys() - unbounded_environment().keys()}
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(bench, first, speed, also=others).result()
    finally:
        os.environ.update(bounds)
