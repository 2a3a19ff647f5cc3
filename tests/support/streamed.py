"""Logits block by block, as a run computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from structprune.architectures.stock.model import StockModel, output_tensor


@torch.no_grad()
def streamed_logits(stock: StockModel, ids_BS: Tensor) -> Tensor:
    """Embed, pass one block after the other, and apply the head, (B, S, V)."""
    reader = stock.reader
    hidden_BSD, inputs = stock.embed(ids_BS, reader.read(stock.embedding_tensors()))
    for block in stock.layout.blocks:
        module = stock.block(block.index, reader.read(block.shapes, block.prefix))
        hidden_BSD = output_tensor(module(hidden_BSD, **inputs.kwargs[block.index]))
    return stock.head(reader.read(stock.head_tensors()))(hidden_BSD)
