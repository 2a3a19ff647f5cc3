"""Decoder blocks with what they are called with, recorded from one forward pass of the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structprune.tracing.graph import Traced, trace
from structprune.tracing.replay import Example

IDS_BS = torch.arange(14).reshape(2, 7)
"""Two windows of seven positions: sizes that no width of the tiny models has."""


@dataclass(frozen=True, kw_only=True)
class RecordedBlock:
    """One block in float64, and its arguments."""

    index: int
    module: nn.Module
    example: Example

    def trace(self) -> Traced:
        """The block's graph, of which the stream alone is wanted: some blocks give the scores of attention too."""
        return trace(self.module, self.example.args, self.example.kwargs, num_outputs=1)


def recorded_blocks(model: Any) -> list[RecordedBlock]:
    """The blocks of a random model, with weights that are far enough from zero to be seen in every output.

    They are the modules of the list that holds most parameters. Mixtures compute each token's experts by look-ups of
    their weights, which has a fixed graph; loops over the experts that were hit have none.
    """
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "batched_mm"
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    blocks = max(lists, key=lambda each: sum(parameter.numel() for parameter in each.parameters()))
    generator = torch.Generator().manual_seed(0)
    model.double().eval().requires_grad_(False)
    for parameter in blocks.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    calls: dict[int, Example] = {}

    def record(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            plain = {name: value for name, value in kwargs.items() if is_plain(value)}
            calls[index] = Example(args=args, kwargs=plain)

        return hook

    handles = [block.register_forward_pre_hook(record(n), with_kwargs=True) for n, block in enumerate(blocks)]
    model(input_ids=IDS_BS, use_cache=False)
    for handle in handles:
        handle.remove()
    return [RecordedBlock(index=n, module=block, example=calls[n]) for n, block in enumerate(blocks)]


def is_plain(value: Any) -> bool:
    """Whether torch.export takes the argument; a cache's bookkeeping, empty in a pass without a cache, it does not."""
    leaves = pytree.tree_leaves(value)
    return all(each is None or isinstance(each, Tensor | bool | int | float | str) for each in leaves)
