"""Sums over calibration windows that one half of a block is solved from.

Shape suffixes: B windows, S positions, D hidden size, T tokens, I consumer inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structprune.calibration.store import HiddenStore
from structprune.engine.job import Job
from structprune.engine.propagate import Propagator, tapped
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout, Moments, UnitGroup

Reference = Callable[[int, int], Tensor]
"""(start, stop) -> what the half's output for these windows should be, (B, S, D) on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """Hidden states of the calibration windows between two halves, and the loop that moves them on."""

    propagator: Propagator
    pruned: HiddenStore
    dense: HiddenStore
    """The dense model's: all windows where the target is the dense path, else the few whose perplexity is reported."""


def measure(
    job: Job,
    block: BlockLayout,
    group: UnitGroup,
    module: nn.Module,
    streams: Streams,
    windows: tuple[int, int],
    reference: Reference | None,
) -> Moments:
    """Sums of the consumer's inputs in the pruned stream, and with a reference of its targets, over some windows.

    The half runs without its consumer, which leaves the residual; the target is the reference minus that, minus the
    consumer's bias. Neither stream is moved, unless the reference does it.
    """
    inputs: list[Tensor] = []
    num_inputs = group.num_units * group.width
    hidden_size = job.stock.layout.hidden_size
    accumulator = GramAccumulator(num_inputs, job.device)
    target_OI = torch.zeros(hidden_size, num_inputs, device=job.device) if reference is not None else None
    energy, residual_energy = 0.0, 0.0
    for start, stop in streams.propagator.batches(*windows):
        wanted_BSD = None if reference is None else reference(start, stop)
        with job.stock.half(module, group.kind), tapped(module, group.consumer_module, inputs.append):
            residual_BSD = streams.propagator.forward(module, block.index, streams.pruned, start, stop)
        residual_energy += float(residual_BSD.float().square().sum(dtype=torch.float64))
        x_TI = inputs.pop().to(torch.float32)
        accumulator.update(x_TI)
        if wanted_BSD is not None and target_OI is not None:
            target_TD = consumer_target(group, module, wanted_BSD, residual_BSD)
            target_OI.addmm_(target_TD.T, x_TI)
            energy += float(target_TD.square().sum(dtype=torch.float64))
    num_tokens, sum_I = accumulator.num_tokens, accumulator.sum_I.cpu()
    return Moments(
        gram_II=accumulator.finalize(f"block {block.index} {group.kind}").cpu(),
        num_tokens=num_tokens,
        sum_I=sum_I,
        target_OI=None if target_OI is None else target_OI.cpu(),
        target_energy=None if target_OI is None else energy,
        residual_energy=residual_energy,
    )


def consumer_target(group: UnitGroup, module: nn.Module, wanted_BSD: Tensor, residual_BSD: Tensor) -> Tensor:
    """What the consumer's product should be, float32 (T, D)."""
    bias_D = 0.0 if group.consumer_bias is None else module.get_parameter(group.consumer_bias).float()
    return (wanted_BSD.float() - residual_BSD.float() - bias_D).reshape(-1, wanted_BSD.shape[-1])


def moving_dense(job: Job, block: BlockLayout, group: UnitGroup, module: nn.Module, streams: Streams) -> Reference:
    """The dense stream after the half: each call moves its windows on."""

    def output(start: int, stop: int) -> Tensor:
        with job.stock.half(module, group.kind):
            output_BSD = streams.propagator.forward(module, block.index, streams.dense, start, stop)
        streams.dense.write(start, output_BSD.cpu())
        return output_BSD

    return output
