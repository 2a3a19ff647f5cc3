"""Reads one block of a streamed model: its tensors as stored, and the stock layer that runs with them."""

from __future__ import annotations

from torch import Tensor, nn

from structprune.engine.streaming.model import StreamedModel
from structprune.types import BlockLayout


def load_block(model: StreamedModel, block: BlockLayout) -> tuple[dict[str, Tensor], nn.Module]:
    """Load the block's tensors as stored, and the stock layer with them in the dtype of the forward passes."""
    tensors = model.reader.read(block.shapes, block.prefix)
    return tensors, model.stock.block(block.index, {n: t.to(model.device, model.dtype) for n, t in tensors.items()})
