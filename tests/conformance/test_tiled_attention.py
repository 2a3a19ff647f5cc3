"""Tiled attention: as close to exact attention as SDPA, for any sharing of heads; SDPA itself wherever it is not plain.

Shape suffixes: B windows, H heads, K key-value heads, S positions, D width of queries and keys, V width of values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from structprune.architectures.stock import model
from structprune.architectures.stock import tiled_attention as tiles
from structprune.architectures.stock.model import StockModel, output_tensor
from structprune.architectures.stock.tiled_attention import TILED, causal_attention, tiled_attention, tiles_gain
from structprune.checkpoint.reader import CheckpointReader
from support.models import TINY_MODELS, save_tiny


def heads(num_windows: int, num_heads: int, length: int, width: int, seed: int) -> Tensor:
    """As stock layers make them: positions outside, then turned."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_windows, length, num_heads, width, generator=generator).bfloat16().transpose(1, 2)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(shared, dim=1) for x in (key, value))
    scores = scale * query.double() @ key.transpose(2, 3)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 129, 1024])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "value_width"), [(6, 6, 16), (6, 2, 16), (4, 1, 5)])
def test_equals_exact_attention(length: int, num_heads: int, num_kv_heads: int, value_width: int) -> None:
    query = heads(2, num_heads, length, 16, seed=0)
    key, value = heads(2, num_kv_heads, length, 16, seed=1), heads(2, num_kv_heads, length, value_width, seed=2)
    found = causal_attention(query, key, value, 0.3)
    assert found.shape == (2, length, num_heads, value_width)
    expected = exact(query, key, value, 0.3)
    # bfloat16 has eight bits: of each probability, and of each output.
    assert float((found.double() - expected).norm() / expected.norm()) < 4e-3


def test_as_close_as_sdpa() -> None:
    query, key, value = heads(1, 8, 1024, 64, 0), heads(1, 2, 1024, 64, 1), heads(1, 2, 1024, 64, 2)
    expected = exact(query, key, value, 0.125)
    sdpa = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    errors = [
        float((found.double() - expected).norm())
        for found in (causal_attention(query, key, value, 0.125), sdpa.transpose(1, 2))
    ]
    assert errors[0] < 1.25 * errors[1]


def test_heads_that_do_not_fit_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = heads(1, 12, 512, 8, 0), heads(1, 2, 512, 8, 1), heads(1, 2, 512, 8, 2)
    whole = causal_attention(query, key, value, 0.5)
    # Two of the six heads that share their keys, then one.
    for scores in (3 * 64 * 512 - 1, 2 * 64 * 512 - 1):
        monkeypatch.setattr(tiles, "_TILE_SCORES", scores)
        assert torch.equal(causal_attention(query, key, value, 0.5), whole)


class Attention(nn.Module):
    is_causal = True
    num_key_value_groups = 2


PLAIN: dict[str, Any] = {"attention_mask": None}


@pytest.mark.parametrize(
    ("length", "dtype", "changes"),
    [
        (512, torch.float32, {}),
        (511, torch.bfloat16, {}),
        (2049, torch.bfloat16, {}),
        (512, torch.bfloat16, {"attention_mask": torch.ones(1, 1, 512, 512, dtype=torch.bool)}),
        (512, torch.bfloat16, {"is_causal": False}),
    ],
)
def test_sdpa_does_what_is_not_plain(length: int, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    query, key, value = (heads(1, n, length, 8, n).to(dtype) for n in (4, 2, 2))
    arguments = PLAIN | changes
    expected, _ = sdpa_attention_forward(Attention(), query, key, value, **arguments)
    found, weights = tiled_attention(Attention(), query, key, value, **arguments)
    assert weights is None
    assert torch.equal(found, expected)


def test_sdpa_does_what_is_differentiated() -> None:
    query, key, value = (heads(1, n, 512, 8, n).requires_grad_(True) for n in (4, 2, 2))
    found, _ = tiled_attention(Attention(), query, key, value, **PLAIN)
    by_query, by_key, by_value = torch.autograd.grad(found.float().square().sum(), [query, key, value])
    assert all(float(gradient.float().norm()) > 0 for gradient in (by_query, by_key, by_value))


@pytest.mark.parametrize("kind", sorted(TINY_MODELS))
@torch.no_grad()
def test_blocks_of_every_family_agree_with_sdpa(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = StockModel(CheckpointReader(save_tiny(kind, tmp_path / kind)))
    block = stock.layout.blocks[0]
    tensors = {n: t.bfloat16() for n, t in stock.reader.read(block.shapes, block.prefix).items()}
    embedding = {n: t.bfloat16() for n, t in stock.reader.read(stock.embedding_tensors()).items()}
    hidden_BSD, inputs = stock.embed(torch.arange(48)[None] % 30, embedding)
    # On whatever machine.
    monkeypatch.setattr(model, "tiles_gain", lambda: True)
    module = stock.block(0, tensors)
    # The tiny models know few positions.
    monkeypatch.setattr(tiles, "_POSITIONS", range(48, 49))
    tiled = output_tensor(module(hidden_BSD, **inputs.kwargs[0])).float()
    monkeypatch.setattr(tiles, "_POSITIONS", range(0))
    sdpa = output_tensor(module(hidden_BSD, **inputs.kwargs[0])).float()
    assert float((tiled - sdpa).norm() / sdpa.norm()) < 1e-2
    # What a block computes with leaves the model's own setting alone.
    own: Any = stock.block_configs[0]
    assert own._attn_implementation == stock.family.attention_implementation


@pytest.mark.parametrize("has_units", [True, False])
def test_no_tiles_where_the_cpu_has_matrix_units(
    has_units: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_units}, raising=False)
    assert tiles_gain() is not has_units
    stock = StockModel(CheckpointReader(save_tiny("llama", tmp_path / "llama")))
    block: Any = stock.block(0, stock.reader.read(stock.layout.blocks[0].shapes, stock.layout.blocks[0].prefix))
    assert (block.self_attn.config._attn_implementation == TILED) is not has_units
