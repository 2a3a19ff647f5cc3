"""Samples calibration text from the model itself, batched, with a key-value cache.

This is the one step that holds the whole model: each new token needs every block. Windows are filled with several
shorter texts, so that more rows share each pass over the weights.

Shape suffixes: R rows (texts), L text length, N windows, S window length, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from structprune.architectures.stock.loading import load_model
from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import InputError, MemoryBudgetError
from structprune.memory import format_budget, format_bytes

_TEXT_LENGTH = 256
_MAX_ROWS = 128
_SEGMENT = 256


class _GrowingLayer(DynamicLayer):
    """A dynamic cache layer over memory that is allocated once: the stock one copies itself at every token.

    For 96 rows that copy took 54% of a decoding step; the stock static layer computes attention over its full
    length instead, with a mask.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _new, width = key_states.shape
            self._buffers = torch.empty(2, rows, heads, self._length, width, dtype=self.dtype, device=self.device)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        self._buffers[0, :, :, start:stop] = key_states
        self._buffers[1, :, :, start:stop] = value_states
        self.keys, self.values = self._buffers[0, :, :, :stop], self._buffers[1, :, :, :stop]
        return self.keys, self.values


def growing_cache(num_blocks: int, length: int) -> Cache:
    """Create a cache for `length` tokens."""
    return Cache(layers=[_GrowingLayer(length) for _ in range(num_blocks)])


@torch.no_grad()
def sample_windows(
    source: Path | CheckpointReader,
    num_windows: int,
    seq_len: int,
    seed: int,
    *,
    start_id: int | None,
    dtype: torch.dtype,
    device: torch.device,
    budget_bytes: int,
) -> Tensor:
    """Sample token ids, (N, S), at temperature 1 after the start token, which is not part of the text.

    Raises InputError if the tokenizer has no start token, MemoryBudgetError if model and cache pass the budget.
    """
    if start_id is None:
        raise InputError(
            "self-sampling needs a start token, and the tokenizer has none", do="pass a text as --calibration"
        )
    length = min(_TEXT_LENGTH, seq_len)
    num_rows = -(-num_windows * seq_len // length)
    model = load_model(source, device, dtype)
    config = model.config
    rows_at_once = min(_MAX_ROWS, num_rows)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    row_bytes = 2 * config.num_hidden_layers * kv_heads * head_dim * length * dtype.itemsize + 3 * 4 * config.vocab_size
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    rows_at_once = min(rows_at_once, max(0, budget_bytes - model_bytes) // row_bytes)
    if rows_at_once < 1:
        raise MemoryBudgetError(
            "self-sampling holds the whole model and does not fit the budget",
            got=format_bytes(budget_bytes),
            wanted=f"at least {format_budget(model_bytes + row_bytes)}",
            do="raise --memory, or pass a text as --calibration",
        )
    generator = torch.Generator().manual_seed(seed)
    texts: list[Tensor] = []
    for first in range(0, num_rows, rows_at_once):
        rows = min(rows_at_once, num_rows - first)
        cache = growing_cache(config.num_hidden_layers, length)
        ids_RL = torch.empty(rows, length, dtype=torch.int64, device=device)
        token_R1 = torch.full((rows, 1), start_id, dtype=torch.int64, device=device)
        for position in range(length):
            logits_RV = model(input_ids=token_R1, past_key_values=cache, use_cache=True).logits[:, -1].float()
            token_R1 = draw_tokens(logits_RV.softmax(dim=-1), generator)
            ids_RL[:, position] = token_R1[:, 0]
        texts.append(ids_RL.cpu())
    return torch.cat(texts).flatten()[: num_windows * seq_len].reshape(num_windows, seq_len)


def draw_tokens(probabilities_RV: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token per row, (R, 1), by inverting the cumulated float32 probabilities: one random number per row.

    The generator is the host's, so that what is drawn does not depend on where the model runs.

    It is drawn among segments of the vocabulary first, then inside one: cumulating all in float64 took longer than the
    softmax. `multinomial` and Gumbel noise draw one number per vocabulary entry, which took a tenth of a decoding step.
    """
    num_tokens = probabilities_RV.shape[1]
    whole = num_tokens // _SEGMENT * _SEGMENT
    mass_RG = probabilities_RV[:, :whole].unflatten(1, (-1, _SEGMENT)).sum(dim=-1)
    if whole < num_tokens:
        mass_RG = torch.cat([mass_RG, probabilities_RV[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    mass_RG = mass_RG.to(torch.float64)
    cumulated_RG = mass_RG.cumsum(dim=-1)
    threshold_R1 = _thresholds(len(mass_RG), generator).to(mass_RG.device) * cumulated_RG[:, -1:]
    # Scaled by the last entry, which rounding keeps from being exactly one.
    segment_R1 = torch.searchsorted(cumulated_RG, threshold_R1, right=True).clamp_(max=mass_RG.shape[1] - 1)
    threshold_R1 -= cumulated_RG.gather(1, segment_R1) - mass_RG.gather(1, segment_R1)
    token_RS = segment_R1 * _SEGMENT + torch.arange(_SEGMENT, device=segment_R1.device)
    inside_RS = probabilities_RV.gather(1, token_RS.clamp(max=num_tokens - 1)).to(torch.float64)
    cumulated_RS = inside_RS.masked_fill_(token_RS >= num_tokens, 0).cumsum(dim=-1)
    place_R1 = torch.searchsorted(cumulated_RS, threshold_R1, right=True).clamp_(max=_SEGMENT - 1)
    return (segment_R1 * _SEGMENT + place_R1).clamp_(max=num_tokens - 1)


def skip_tokens(num_rows: int, generator: torch.Generator) -> None:
    """Leave the generator as `draw_tokens` does for so many rows: what another process draws is no one else's."""
    _thresholds(num_rows, generator)


def _thresholds(num_rows: int, generator: torch.Generator) -> Tensor:
    return torch.rand(num_rows, 1, dtype=torch.float64, generator=generator)
