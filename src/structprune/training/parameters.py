"""The trainable tensors of the student's blocks as flat float32 vectors, with what AdamW keeps of them.

Shape suffixes: P parameters of a block, one after the other, 3P the same with both moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.calibration.store import FileStore, MemoryStore
from structprune.engine.streaming.model import StreamedModel
from structprune.types import BlockLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockParameters:
    """Names and shapes of the parameters of one block, in the order of the flat vector."""

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def packed(self, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """Pack the tensors into one vector (P), float32."""
        result_P = torch.empty(self.size, device=device)
        for name, view in self.views(result_P).items():
            view.copy_(tensors[name])
        return result_P

    def views(self, flat_P: Tensor) -> dict[str, Tensor]:
        """Split the vector into parts, in the shapes of the tensors."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        parts = flat_P.split(sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def stored(self, tensors: Mapping[str, Tensor], flat_P: Tensor) -> dict[str, Tensor]:
        """Replace the parameters in `tensors` by the vector's values, in the dtypes that they have."""
        views = self.views(flat_P)
        return {n: views[n].cpu().to(t.dtype, copy=True) if n in views else t for n, t in tensors.items()}

    def module(
        self, streamed: StreamedModel, block: BlockLayout, flat_P: Tensor, fixed: Mapping[str, Tensor]
    ) -> nn.Module:
        """Build the stock layer with the vector's values and the `fixed` other tensors of the block.

        Its parameters are copies in the dtype of the forward passes, and take gradients.
        """
        tensors = {**self.views(flat_P), **fixed}
        layer = streamed.stock.block(
            block.index, {n: t.to(streamed.device, streamed.dtype, copy=True) for n, t in tensors.items()}
        )
        for name in self.shapes:
            layer.get_parameter(name).requires_grad_(True)
        return layer

    def gradient_P(self, device: torch.device) -> Tensor:
        """Create float32 zeros for the sum of gradients."""
        return torch.zeros(self.size, device=device)


def parameters_of(streamed: StreamedModel, block: BlockLayout) -> BlockParameters:
    """Return the parameters of the stock layer; buffers that a checkpoint may carry are none."""
    layer = streamed.stock.skeleton.get_submodule(f"{streamed.stock.layout.blocks_module}.{block.index}")
    names = [name for name, _ in layer.named_parameters() if name in block.shapes]
    return BlockParameters(shapes={name: block.shapes[name] for name in names})


class States:
    """Weights and both moments of every block, (3, P) each, in memory or in a file that is read and written plainly."""

    def __init__(self, folder: Path | None, sizes: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._stores = [
            MemoryStore((3, 1, size), torch.float32)
            if folder is None
            else FileStore(folder / f"state-{index}.bin", (3, 1, size), torch.float32)
            for index, size in enumerate(sizes)
        ]

    def weights_P(self, index: int) -> Tensor:
        """Read the weights of one block to the device; they are not to be changed."""
        return self._stores[index].read(0, 1)[0, 0].to(self._device)

    def read_3P(self, index: int) -> Tensor:
        """Read all of one block to the device. What is changed is handed back by `write`."""
        return self._stores[index].read(0, 3)[:, 0].to(self._device)

    def write(self, index: int, state_3P: Tensor) -> None:
        """Keep what `read_3P` gave, or new values."""
        store = self._stores[index]
        if isinstance(store, MemoryStore) and store.read(0, 3).data_ptr() == state_3P.data_ptr():
            return
        store.write(0, state_3P.cpu()[:, None])

    def close(self) -> None:
        for store in self._stores:
            store.close()
