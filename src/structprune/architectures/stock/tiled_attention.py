"""Causal attention in bfloat16 on CPUs, tile by tile: what SDPA computes there, in about two thirds of its time.

SDPA's CPU kernel reaches a sixth of the rate of other products (docs/log/index.md); products of whole tiles reach more.
Not so where the CPU has matrix units: SDPA uses them, and takes less than half of the tiles' time.
Scores, probabilities and their sums are float32, as in SDPA: what goes into a product is rounded to bfloat16.

Shape suffixes: B windows, H heads, K key-value heads, S positions, J heads of one tile, N query positions of one tile,
E positions up to a tile's end, D width of queries and keys, V width of values, R = J * N rows of one tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from structprune.linalg.products import exact_bfloat16_products

TILED = "structprune_tiled"
# Every tile of a window has its own number of keys, and the library prepares each shape of a product: so there are as
# many, however long the window is. Of all pairs 56% are computed, for the 50% that are wanted.
_NUM_TILES = 8
# Scores of one tile: 4 MiB in float32, which stay in the cache.
_TILE_SCORES = 2**20
# In shorter windows the time goes between the products; in longer ones a tile of one head is larger than the cache.
_POSITIONS = range(512, 2049)


def tiles_gain() -> bool:
    """Whether tiles take less time than SDPA on this machine: where it has no matrix units for bfloat16 (AMX)."""
    found: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return not found.get("amx_bf16", False)


def scratch_bytes(seq_len: int) -> int:
    """Return the most bytes of one call beside inputs and output: scores, probabilities, and these in bfloat16."""
    return _TILE_SCORES * (4 + 4 + 2) if seq_len in _POSITIONS else 0


def tiled_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Implement transformers' attention interface: (B, H, S, D), (B, K, S, D), (B, K, S, V) -> (B, S, H, V).

    Returns no weights. SDPA does what is not bfloat16 on a CPU, not plainly causal, differentiated, or of a length that
    gains nothing.
    """
    tensors = (query, key, value)
    if (
        attention_mask is not None
        or any(tensor.device.type != "cpu" or tensor.dtype != torch.bfloat16 for tensor in tensors)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or query.shape[2] != key.shape[2]
        or query.shape[2] not in _POSITIONS
        or not getattr(module, "is_causal", True)
        or any(kwargs.get(name) is not None for name in ("is_causal", "position_bias"))
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return causal_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


@torch.no_grad()
def causal_attention(query_BHSD: Tensor, key_BKSD: Tensor, value_BKSV: Tensor, scale: float) -> Tensor:
    """Compute softmax(scale Q K^T) V over each position and those before it, (B, S, H, V); H / K heads share keys."""
    num_windows, num_heads, length, width = query_BHSD.shape
    num_shared = num_heads // key_BKSD.shape[1]
    step = -(-length // _NUM_TILES)
    # Heads that share their keys share a tile, as many as fit.
    together = next(n for n in range(num_shared, 0, -1) if num_shared % n == 0 and n * step * length <= _TILE_SCORES)
    # Taken once: of its own size for each tile it would come from the system, page by page.
    scores, probabilities = torch.empty(2, together * step * length).unbind()
    future_NN = torch.ones(step, step, dtype=torch.bool).triu(1)
    output_BSHV = query_BHSD.new_empty(num_windows, length, num_heads, value_BKSV.shape[-1])
    # A power of two, as for heads of 64, is exact: then queries are scaled once, not all scores.
    exact = math.frexp(scale)[0] == 0.5
    with exact_bfloat16_products():
        for window in range(num_windows):
            for head in range(0, num_heads, together):
                key_SD = key_BKSD[window, head // num_shared].float()
                value_SV = value_BKSV[window, head // num_shared].contiguous()
                query_JSD = query_BHSD[window, head : head + together].float()
                if exact:
                    query_JSD.mul_(scale)
                for start in range(0, length, step):
                    stop = min(start + step, length)
                    query_RD = query_JSD[:, start:stop].reshape(-1, width)
                    shape = (len(query_RD), stop)
                    scores_RE = scores[: shape[0] * stop].view(shape)
                    torch.mm(query_RD, key_SD[:stop].T, out=scores_RE)
                    if not exact:
                        scores_RE.mul_(scale)
                    own_JNN = scores_RE.view(together, stop - start, stop)[:, :, start:]
                    own_JNN.masked_fill_(future_NN[: stop - start, : stop - start], -torch.inf)
                    probabilities_RE = probabilities[: shape[0] * stop].view(shape)
                    torch.softmax(scores_RE, dim=-1, out=probabilities_RE)
                    found_RV = probabilities_RE.to(value_SV.dtype) @ value_SV[:stop]
                    found_JNV = found_RV.view(together, stop - start, -1)
                    output_BSHV[window, start:stop, head : head + together] = found_JNV.transpose(0, 1)
    return output_BSHV


AttentionInterface.register(TILED, tiled_attention)
