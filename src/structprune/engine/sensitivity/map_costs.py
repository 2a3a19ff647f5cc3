"""What zeros in each linear map would add to the loss, measured on the dense model before anything is pruned.

The streamed backward pass (`backward_pass.py`) brings the exact gradient of the loss to the output of every map. With G
the Gram matrix of a map's inputs, f_o the mean square of the gradient by output o (labels sampled from the model: the
diagonal of the Fisher information) and d_o what a mask takes from row o, the loss grows by about

    1/2 sum_o f_o d_o G d_o^T / tokens

The mask is that of Wanda's score, without new weights for what stays: what an update makes up for is taken to be alike
everywhere. Shares between those that are measured are on a straight line in the logarithm of the cost.

Shape suffixes: I inputs, O outputs, T tokens, P measured shares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from structprune.architectures.stock.maps import InputGroup, MapStep
from structprune.calibration.store import HiddenStore
from structprune.engine.run.context import RunContext
from structprune.engine.sensitivity.backward_pass import Found, backward_pass
from structprune.engine.sensitivity.store import costs_path
from structprune.engine.streaming.backward import differentiate
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.propagate import Propagator, captured
from structprune.linalg.gram_products import output_energy
from structprune.memory import release_free_memory
from structprune.patterns import Pattern
from structprune.phases import Phase
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout


def map_costs(
    context: RunContext, steps: Sequence[Sequence[MapStep]], patterns: Sequence[Pattern], folder: Path
) -> list[dict[str, Tensor]]:
    """Measure what every pattern adds to the loss in every map of every block: map -> (P,), nats per token.

    What is found stays in `folder`. Raises NumericalError for activations that are not finite.
    """

    def costs_of(
        block: BlockLayout, propagator: Propagator, boundary: HiddenStore, gradient: HiddenStore, owner: int
    ) -> Callable[[], Found]:
        groups = [group for step in steps[block.index] for group in step.groups]
        with context.meter.phase(Phase.SENSITIVITY_BACKWARD):
            return partial(_found, _block_costs(context, block, groups, patterns, (propagator, boundary, gradient)))

    backward_pass(context, folder, labels="sampled", backward=costs_of)
    return [load_file(costs_path(folder, block.index)) for block in context.stock.layout.blocks]


def _found(costs: Mapping[str, Tensor]) -> Found:
    return {}, costs


def _block_costs(
    context: RunContext,
    block: BlockLayout,
    groups: Sequence[InputGroup],
    patterns: Sequence[Pattern],
    streams: tuple[Propagator, HiddenStore, HiddenStore],
) -> dict[str, Tensor]:
    """Move the gradient over a block, and measure its maps by what was summed on the way."""
    tensors, module = load_block(context, block)
    names = [name for group in groups for name in group.maps]
    weights = {name: _weight(context, tensors, name) for name in names}
    grams = {group.maps[0]: context.accumulator(weights[group.maps[0]].shape[1]) for group in groups}
    squares = {name: torch.zeros(len(weight), dtype=torch.float64) for name, weight in weights.items()}
    outputs: dict[str, Tensor] = {}

    def receive(found: Sequence[Tensor]) -> None:
        for name, gradient in zip(names, found, strict=True):
            squares[name] += gradient.reshape(-1, gradient.shape[-1]).float().square_().sum(dim=0).cpu()
        outputs.clear()

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(captured(module, name, partial(outputs.__setitem__, name)))
        for name, gram in grams.items():
            hook = partial(_add, gram=gram)
            stack.callback(module.get_submodule(name).register_forward_pre_hook(hook).remove)
        propagator, boundary, gradient = streams
        differentiate(
            context,
            block,
            module,
            propagator,
            boundary,
            gradient,
            wanted=lambda: [outputs[name] for name in names],
            receive=receive,
        )
    del module
    release_free_memory()
    costs: dict[str, Tensor] = {}
    for group in groups:
        gram, first = grams.pop(group.maps[0]), group.maps[0]
        num_tokens, gram_II = gram.num_tokens, gram.finalize(f"block {block.index} {first}").to(context.solve_device)
        for name in group.maps:
            weight_OI = weights[name].to(context.solve_device)
            fisher_O = (squares[name] / num_tokens).to(weight_OI.device)
            found = [removal_cost(weight_OI, gram_II, fisher_O, pattern) / num_tokens for pattern in patterns]
            costs[name] = torch.tensor(found, dtype=torch.float64)
    return costs


def removal_cost(weight_OI: Tensor, gram_II: Tensor, fisher_O: Tensor, pattern: Pattern) -> float:
    """Compute 1/2 sum_o f_o d_o G d_o^T, d what goes by Wanda's score."""
    norm_I = gram_II.diagonal().to(torch.float64).sqrt()
    weight_OI = weight_OI.float()
    keep_OI = pattern.keep_largest(weight_OI.abs() * (norm_I / norm_I.max().clamp(min=1e-300)).float())
    # As wide as float32: squares of gradients are small.
    scale = float(fisher_O.max()) or 1.0
    gone_OI = weight_OI.masked_fill(keep_OI, 0).mul_((fisher_O / scale).sqrt().float()[:, None])
    return 0.5 * scale * output_energy(gone_OI, gram_II, dtype=torch.float32)


def _add(_: nn.Module, args: tuple[Tensor, ...], *, gram: GramAccumulator) -> None:
    gram.update(args[0].detach().reshape(-1, args[0].shape[-1]))


def _weight(context: RunContext, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = tensors[f"{name}.weight"]
    return tensor.T if context.stock.family.inputs_first else tensor
