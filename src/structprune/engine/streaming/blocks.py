"""Reads one block of a streamed model: its tensors as stored, and the stock layer that runs with them."""

from __future__ import annotations

from torch import Tensor, nn

from structprune.engine.run.context import StreamedModel
from structprune.types import BlockLayout


def load_block(context: StreamedModel, block: BlockLayout) -> tuple[dict[str, Tensor], nn.Module]:
    """The block's tensors as stored, and the stock layer with them in the dtype of the forward passes."""
    tensors = context.reader.read(block.shapes, block.prefix)
    return tensors, context.stock.block(
        block.index, {n: t.to(context.device, context.dtype) for n, t in tensors.items()}
    )
