"""What learns in the student's blocks as flat float32 vectors, with what AdamW keeps of them.

Either all parameters of a block, or its vectors and a scale for every input of its consumers: some thousand numbers.

Shape suffixes: P parameters of a block, one after the other, 3P the same with both moments, I consumer inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.architectures.modeling.value_channels import NarrowOutputs
from structprune.calibration.store import FileStore, MemoryStore
from structprune.engine.streaming.model import StreamedModel
from structprune.types import AxisSlice, BlockLayout


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

    def fixed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick the block's other tensors that stay in memory, for `module`."""
        return {name: tensor for name, tensor in tensors.items() if name not in self.shapes}

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleParameters(BlockParameters):
    """The block's vectors (gains of norms, biases) and scales of its consumers' inputs, which are one at the start.

    The matrices do not learn and are read anew for every module. A scale is a float32 parameter of the consumer's
    module; in a checkpoint it is folded into the consumer's weight.
    """

    consumers: Mapping[str, AxisSlice]
    """Name of the scale -> the consumer's weight and the axis of its inputs."""

    def packed(self, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
        result_P = torch.ones(self.size, device=device)
        for name, view in self.views(result_P).items():
            if name not in self.consumers:
                view.copy_(tensors[name])
        return result_P

    def fixed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def stored(self, tensors: Mapping[str, Tensor], flat_P: Tensor) -> dict[str, Tensor]:
        views = self.views(flat_P.cpu())
        result = {n: views[n].to(t.dtype, copy=True) if n in views else t for n, t in tensors.items()}
        for name, part in self.consumers.items():
            weight = result[part.tensor]
            scaled = weight.movedim(part.axis, -1).float() * views[name]
            result[part.tensor] = scaled.movedim(-1, part.axis).to(weight.dtype).contiguous()
        return result

    def module(
        self, streamed: StreamedModel, block: BlockLayout, flat_P: Tensor, fixed: Mapping[str, Tensor]
    ) -> nn.Module:
        views = self.views(flat_P)
        tensors = streamed.reader.read(block.shapes, block.prefix)
        put = partial(Tensor.to, device=streamed.device, dtype=streamed.dtype)
        layer = streamed.stock.block(
            block.index, {n: put(views[n], copy=True) if n in views else put(t) for n, t in tensors.items()}
        )
        for name in self.shapes:
            if name in self.consumers:
                consumer = layer.get_submodule(name.rpartition(".")[0])
                consumer.register_parameter(_SCALE, nn.Parameter(views[name].clone()))
                consumer.register_forward_pre_hook(_scale_inputs)
            else:
                layer.get_parameter(name).requires_grad_(True)
        return layer


_SCALE = "structprune_input_scale"


def _scale_inputs(consumer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = args
    scale = consumer.get_parameter(_SCALE)
    if isinstance(consumer, NarrowOutputs):
        scale = consumer.spread(scale)
    return (x * scale).to(x.dtype), *others


def parameters_of(streamed: StreamedModel, block: BlockLayout) -> BlockParameters:
    """Return the parameters of the stock layer; buffers that a checkpoint may carry are none."""
    layer = streamed.stock.skeleton.get_submodule(f"{streamed.stock.layout.blocks_module}.{block.index}")
    names = [name for name, _ in layer.named_parameters() if name in block.shapes]
    return BlockParameters(shapes={name: block.shapes[name] for name in names})


def scales_of(streamed: StreamedModel, block: BlockLayout, still: Collection[str] = ()) -> ScaleParameters:
    """Return the block's vectors but those in `still` (full names), and a scale for each input of its consumers.

    The experts of a mixture have no scales: there are as many consumers as experts, few of which meet a token.
    """
    found = parameters_of(streamed, block).shapes.items()
    vectors = {name: shape for name, shape in found if len(shape) == 1 and block.prefix + name not in still}
    groups = [group for group in block.groups if len(block.groups_of(group.kind)) == 1]
    consumers = {f"{group.consumer_module}.{_SCALE}": group.consumer for group in groups}
    scales = {name: (block.shapes[part.tensor][part.axis],) for name, part in consumers.items()}
    return ScaleParameters(shapes={**vectors, **scales}, consumers=consumers)


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
