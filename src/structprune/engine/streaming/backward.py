"""Differentiates one block over every window, so that the gradient of a loss moves from its output to its input.

Shape suffixes: B windows, S positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from structprune.architectures.stock.model import output_tensor
from structprune.calibration.store import HiddenStore
from structprune.engine.streaming.model import StreamedModel
from structprune.engine.streaming.propagate import Propagator
from structprune.types import BlockLayout


def differentiate(
    model: StreamedModel,
    block: BlockLayout,
    module: nn.Module,
    propagator: Propagator,
    boundary: HiddenStore,
    gradient: HiddenStore,
    *,
    wanted: Callable[[], Sequence[Tensor]],
    receive: Callable[[Sequence[Tensor]], None],
) -> None:
    """Move `gradient` from the block's output to its input, one window at a time.

    `wanted` is asked after each window's forward pass; the loss's derivatives by these tensors go to `receive`, which
    may not keep them: one may be a view of what is overwritten next.
    """
    inputs, gradients = propagator.read_each(boundary), propagator.read_each(gradient)
    with propagator.writing(gradient) as put:
        for (window, hidden_BSD), (_, gradient_BSD) in zip(inputs, gradients, strict=True):
            hidden_BSD.requires_grad_(True)
            with torch.enable_grad():
                output_BSD = output_tensor(module(hidden_BSD, **propagator.kwargs(1, block.index)))
                # Zeros for an expert that no token of the window is sent to.
                found = torch.autograd.grad(
                    output_BSD, [hidden_BSD, *wanted()], gradient_BSD.to(model.dtype), materialize_grads=True
                )
            receive(found[1:])
            put(window, found[0].float())
            # Derivatives by weights are as large as the block: those of two windows are not to be held at once.
            del found, output_BSD
