"""Speed, memory and size of finished models, timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structprune.architectures.sources.adapter import NO_ADAPTER
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.stock.config import max_positions
from structprune.architectures.stock.loading import load_model
from structprune.engine.run.device import machine, resolve_device, resolve_dtype
from structprune.errors import InputError
from structprune.evaluation.speed import SpeedResult, quartiles, speed_pair
from structprune.recipe import Recipe
from structprune.results.measured import Bench, BenchedModel, Rate, SpeedPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRequest:
    """What to time on a model, beside its name."""

    batches: Sequence[int] = (1,)
    prompts: Sequence[int] = (512,)
    """Tokens of the prompts; every batch size is timed with every length."""
    decode_tokens: int = 32
    """Tokens to decode behind each prompt."""
    repeats: int = 5
    """Timed runs of each point, after a warm-up."""
    device: str = "auto"
    dtype: str = "auto"


def bench(
    model: str | Path,
    request: SpeedRequest | None = None,
    *,
    merge_adapter: str = NO_ADAPTER,
    against: str | Path | None = None,
    also: Sequence[str | Path] = (),
    advance: Callable[[str], None] = lambda text: None,
) -> Bench:
    """Measure prefill and decode speed, memory and size of `model`, at every batch size and prompt length.

    `merge_adapter` is the folder of a LoRA adapter that is merged into `model` first, or `beside`.
    With `against` both models are in memory and timed in turn, and speeds are given as ratios too; models in `also` are
    measured beside them in the same way. `advance` hears of each point of the grid. Raises StructPruneError.
    """
    request = request or SpeedRequest()
    recipe = Recipe.build(device=request.device, dtype=request.dtype)
    target = resolve_device(recipe.device)
    compute_dtype = resolve_dtype(recipe, target)
    names = [str(model), *([] if against is None else [str(against)]), *map(str, also)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError("two of the models are the same", got=twice[0], do="name each one once")
    # Headers of all first: a model that is not there is refused before the other is loaded.
    readers = {name: open_model(name, adapter=merge_adapter if name == str(model) else NO_ADAPTER) for name in names}
    loaded = {name: load_model(reader, target, compute_dtype) for name, reader in readers.items()}
    for name, one in loaded.items():
        check_positions(name, one.config, max(request.prompts) + request.decode_tokens)
    points: dict[str, list[SpeedPoint]] = {name: [] for name in names}
    weights = {name: sum(p.numel() * p.element_size() for p in one.parameters()) for name, one in loaded.items()}
    for batch in request.batches:
        for prompt in request.prompts:
            found = speed_pair(
                loaded,
                prompt_tokens=prompt,
                decode_tokens=request.decode_tokens,
                batch=batch,
                repeats=request.repeats,
            )
            base = None if against is None else str(against)
            for name in names:
                ratios = (None, None) if base in (None, name) else found[name].ratios(found[base])
                points[name].append(_point(found[name], weights[name], ratios))
            advance(f"batch {batch}, prompt of {prompt} tokens")
    return Bench(
        device=str(target),
        dtype=str(compute_dtype).removeprefix("torch."),
        machine=machine(),
        repeats=request.repeats,
        models=[
            BenchedModel(
                model=name,
                parameters=sum(parameter.numel() for parameter in loaded[name].parameters()),
                file_bytes=readers[name].file_bytes,
                weight_bytes=weights[name],
                points=points[name],
            )
            for name in names
        ],
    )


def check_positions(name: str, config: Any, wanted: int) -> None:
    """Raise InputError if a model has fewer positions than are wanted."""
    limit = max_positions(config)
    if wanted > limit:
        raise InputError(
            "the prompt and what is decoded are longer than the model's positions",
            where=name,
            got=f"{wanted} tokens",
            wanted=f"at most {limit}",
            do="lower --prompt or --decode",
        )


def _point(found: SpeedResult, weight_bytes: int, ratios: tuple[float | None, float | None]) -> SpeedPoint:
    return SpeedPoint(
        batch=found.batch,
        prompt_tokens=found.prompt_tokens,
        decode_tokens=found.decoded_tokens,
        prefill=_rate(found.prefill_tokens_per_s, found.prefill_rates),
        decode=_rate(found.decode_tokens_per_s, found.decode_rates),
        peak_bytes=weight_bytes + found.peak_bytes,
        prefill_ratio=ratios[0],
        decode_ratio=ratios[1],
    )


def _rate(median: float, rates: Sequence[float]) -> Rate:
    low, high = quartiles(rates)
    return Rate(median=median, low=low, high=high)
