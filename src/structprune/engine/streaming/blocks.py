"""Reads one block of a streamed model: its tensors as stored, and the stock layer that runs with them."""

from __future__ import annotations

from torch import Tensor, nn

from structprune.engine.run.context import Streamed
from structprune.types import BlockLayout


def load_block(job: Streamed, block: BlockLayout) -> tuple[dict[str, Tensor], nn.Module]:
    """The block's tensors as stored, and the stock layer with them in the dtype of the forward passes."""
    tensors = job.reader.read(block.shapes, block.prefix)
    return tensors, job.stock.block(block.index, {n: t.to(job.device, job.dtype) for n, t in tensors.items()})
