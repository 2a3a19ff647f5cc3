"""Prefill and decode speed of a stock model: warm-up first, medians over repeats."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult:
    """Tokens per second at batch 1."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    decoded_tokens: int


@torch.no_grad()
def speed_pair(
    models: dict[str, Any], *, prompt_tokens: int = 512, decode_tokens: int = 32, repeats: int = 5
) -> dict[str, SpeedResult]:
    """Time the models in turn, A B A B, so that a machine whose speed drifts slows all alike."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            pair = _once(model, prompt_tokens, decode_tokens)
            if repeat > 0:
                times[name].append(pair)
    return {
        name: SpeedResult(
            prefill_tokens_per_s=prompt_tokens / statistics.median(p for p, _ in pairs),
            decode_tokens_per_s=decode_tokens / statistics.median(d for _, d in pairs),
            prompt_tokens=prompt_tokens,
            decoded_tokens=decode_tokens,
        )
        for name, pairs in times.items()
    }


def _once(model: Any, prompt_tokens: int, decode_tokens: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)
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
