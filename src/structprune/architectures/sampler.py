"""Samples calibration text from the model itself, batched, with a key-value cache.

This is the one step that holds the whole model: each new token needs every block. Windows are filled with several
shorter texts, so that more rows share each pass over the weights.

Shape suffixes: R rows (texts), L text length, N windows, S window length, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import StaticCache

from structprune.architectures.stock import load_model
from structprune.errors import InputError, MemoryBudgetError
from structprune.memory import format_bytes

_TEXT_LENGTH = 256
_MAX_ROWS = 128


@torch.no_grad()
def sample_windows(
    directory: Path,
    num_windows: int,
    seq_len: int,
    seed: int,
    *,
    start_id: int | None,
    dtype: torch.dtype,
    device: torch.device,
    budget_bytes: int,
) -> Tensor:
    """(N, S) token ids sampled at temperature 1 after the start token, which is not part of the text.

    Raises InputError if the tokenizer has no start token, MemoryBudgetError if model and cache pass the budget.
    """
    if start_id is None:
        raise InputError(
            "self-sampling needs a start token, and the tokenizer has none", do="pass a text as --calibration"
        )
    length = min(_TEXT_LENGTH, seq_len)
    num_rows = -(-num_windows * seq_len // length)
    model = load_model(directory, device, dtype)
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
            wanted=f"at least {format_bytes(model_bytes + row_bytes)}",
            do="raise --memory, or pass a text as --calibration",
        )
    generator = torch.Generator(device=device).manual_seed(seed)
    texts: list[Tensor] = []
    for first in range(0, num_rows, rows_at_once):
        rows = min(rows_at_once, num_rows - first)
        cache = StaticCache(config=config, max_cache_len=length)
        ids_RL = torch.empty(rows, length, dtype=torch.int64, device=device)
        token_R1 = torch.full((rows, 1), start_id, dtype=torch.int64, device=device)
        for position in range(length):
            positions = torch.full((1, 1), position, device=device)
            logits_RV = (
                model(input_ids=token_R1, past_key_values=cache, use_cache=True, position_ids=positions)
                .logits[:, -1]
                .float()
            )
            # argmax(logits + Gumbel noise) is a draw from the softmax without normalising it.
            noise_RV = torch.empty_like(logits_RV).exponential_(generator=generator).log_()
            token_R1 = (logits_RV - noise_RV).argmax(dim=-1, keepdim=True)
            ids_RL[:, position] = token_R1[:, 0]
        texts.append(ids_RL.cpu())
    return torch.cat(texts).flatten()[: num_windows * seq_len].reshape(num_windows, seq_len)
