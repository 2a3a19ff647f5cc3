"""Prefill and decode speed of stock models: warm-up first, medians and quartiles over repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from structprune.memory import PeakMeter


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult:
    """Tokens per second, over all sequences of the batch."""

    prefill_tokens_per_s: float
    """Median over the repeats."""
    decode_tokens_per_s: float
    prompt_tokens: int
    """Tokens in the prompt of each sequence."""
    decoded_tokens: int
    batch: int
    prefill_rates: tuple[float, ...]
    """Prefill tokens per second of each repeat; models that were timed together ran their repeats in turn."""
    decode_rates: tuple[float, ...]
    peak_bytes: int
    """What a run added to this process, or on CUDA to the device: activations, logits and cache."""

    def ratios(self, other: SpeedResult) -> tuple[float, float]:
        """Return the median ratios of prefill and of decode speed to the other model's in the same repeat."""
        pairs = ((self.prefill_rates, other.prefill_rates), (self.decode_rates, other.decode_rates))
        prefill, decode = (statistics.median(a / b for a, b in zip(mine, its, strict=True)) for mine, its in pairs)
        return prefill, decode


def quartiles(rates: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; of a single value, that value twice."""
    if len(rates) == 1:
        return rates[0], rates[0]
    low, _, high = statistics.quantiles(rates, n=4, method="inclusive")
    return low, high


@torch.no_grad()
def speed_pair(
    models: Mapping[str, Any],
    *,
    prompt_tokens: int = 512,
    decode_tokens: int = 32,
    batch: int = 1,
    repeats: int = 5,
) -> dict[str, SpeedResult]:
    """Time the models in turn, A B A B, so that a machine whose speed drifts slows all alike."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks: dict[str, int] = {}
    for name, model in models.items():
        # Weights are pages of a mapped file: the first run makes them resident, and its peak would count them twice.
        time_once(model, batch, 1, 1)
        peaks[name] = _peak_of_one_run(model, batch, prompt_tokens, decode_tokens)
    for _ in range(repeats):
        for name, model in models.items():
            times[name].append(time_once(model, batch, prompt_tokens, decode_tokens))
    results: dict[str, SpeedResult] = {}
    for name, pairs in times.items():
        prefill = tuple(batch * prompt_tokens / seconds for seconds, _ in pairs)
        decode = tuple(batch * decode_tokens / seconds for _, seconds in pairs)
        results[name] = SpeedResult(
            prefill_tokens_per_s=statistics.median(prefill),
            decode_tokens_per_s=statistics.median(decode),
            prompt_tokens=prompt_tokens,
            decoded_tokens=decode_tokens,
            batch=batch,
            prefill_rates=prefill,
            decode_rates=decode,
            peak_bytes=peaks[name],
        )
    return results


def _peak_of_one_run(model: Any, batch: int, prompt_tokens: int, decode_tokens: int) -> int:
    """Measure the peak memory of one run, in bytes above what was there before; the run is the warm-up too."""
    if model.device.type == "cuda":
        before = torch.cuda.memory_allocated(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        time_once(model, batch, prompt_tokens, decode_tokens)
        return torch.cuda.max_memory_allocated(model.device) - before
    with PeakMeter() as meter:
        time_once(model, batch, prompt_tokens, decode_tokens)
    return meter.peak_bytes


def time_once(model: Any, batch: int, prompt_tokens: int, decode_tokens: int) -> tuple[float, float]:
    """Time one prefill and the decoding of `decode_tokens` behind it, in seconds."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, prompt_tokens)
    ids_BS = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.device)
    cache = DynamicCache(config=model.config)
    start = _now(model)
    output = model(input_ids=ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
    prefill = _now(model) - start
    token_B1 = output.logits[:, -1:].argmax(dim=-1)
    start = _now(model)
    for _ in range(decode_tokens):
        output = model(input_ids=token_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token_B1 = output.logits[:, -1:].argmax(dim=-1)
    return prefill, _now(model) - start


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
