"""The sensitivity pass of LLM-Pruner: sums of weights times gradients per unit, by the streamed backward pass.

While a block is differentiated the gradients of its prunable weights and their squares are summed over the windows, in
float32; four sums per unit stay of them. Labels are the text's own.

Shape suffixes: U units, R rows of a weight along the axis that shrinks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from structprune.calibration.store import HiddenStore
from structprune.engine.layerwise.problem import layer_problem
from structprune.engine.run.context import RunContext
from structprune.engine.sensitivity.backward_pass import Found, backward_pass
from structprune.engine.sensitivity.fisher import add_cost
from structprune.engine.sensitivity.store import Costs, load_found
from structprune.engine.streaming.backward import differentiate
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.propagate import Propagator
from structprune.errors import NOT_FINITE_ADVICE, NumericalError
from structprune.phases import Phase
from structprune.scores import SCORES
from structprune.scores.selection import ascending
from structprune.types import BlockLayout, Sensitivity, TaylorSums, UnitGroup

_SUMS = tuple(field.name for field in fields(TaylorSums))


def taylor_pass(context: RunContext, folder: Path) -> Costs:
    """Measure every block; the sums stay in `folder` for the pruning pass (`load_taylor`).

    The costs are the context's scores, ascending, as the lowest go first.
    """

    def score(
        block: BlockLayout, propagator: Propagator, boundary: HiddenStore, gradient: HiddenStore, owner: int
    ) -> Callable[[], Found]:
        tensors, module = load_block(context, block)
        with context.meter.phase(Phase.SENSITIVITY_BACKWARD):
            sums = weight_sums(context, block, module, propagator, boundary, gradient, owner)
        # Elsewhere nothing is made of them.
        tensors = tensors if owner == context.ranks.rank else {}

        def found() -> Found:
            costs: dict[str, Tensor] = {}
            for group in context.groups(block):
                problem = layer_problem(context, block, group, tensors, [], Sensitivity(taylor=sums[group.name]))
                add_cost(costs, group, ascending(SCORES.get(context.score).score(problem), group.partitions))
            return {f"{name}.{field}": getattr(s, field) for name, s in sums.items() for field in _SUMS}, costs

        return found

    return backward_pass(context, folder, labels="text", backward=score)


def weight_sums(
    context: RunContext,
    block: BlockLayout,
    module: nn.Module,
    propagator: Propagator,
    boundary: HiddenStore,
    gradient: HiddenStore,
    owner: int = 0,
) -> dict[str, TaylorSums]:
    """Move `gradient`, that of the summed loss, from the block's output to its input; return the sums of each group.

    They are those of all ranks at `owner`; elsewhere there are none.
    Raises NumericalError where a gradient is not finite.
    """
    names = {name: group for group in context.groups(block) for name in weight_names(block, group)}
    weights = {name: module.get_parameter(name) for name in names}
    mean = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    square = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    num_windows, num_labels = context.num_backward, gradient.shape[1] - 1

    def add(found: Sequence[Tensor]) -> None:
        for name, grad in zip(weights, found, strict=True):
            window_mean = grad.to(torch.float32) / num_labels
            mean[name].add_(window_mean, alpha=1 / num_windows)
            square[name].addcmul_(window_mean, window_mean, value=1 / num_windows)

    differentiate(
        context, block, module, propagator, boundary, gradient, wanted=lambda: list(weights.values()), receive=add
    )
    context.ranks.reduce([*mean.values(), *square.values()], owner)
    if owner != context.ranks.rank:
        return {}
    for name in weights:
        # The sum of squares is not finite where any gradient was not, or where its square overflows.
        largest = square[name].amax()
        if not torch.isfinite(largest):
            raise NumericalError(
                f"a gradient by {name!r} is NaN or infinite (or overflows when squared)",
                where=f"block {block.index}",
                do=NOT_FINITE_ADVICE,
            )
    with torch.no_grad():
        return {group.name: unit_sums(block, group, weights, mean, square) for group in context.groups(block)}


def weight_names(block: BlockLayout, group: UnitGroup) -> list[str]:
    """List the weights that shrink with the group. A bias moves with its row but is no weight of its own."""
    return list(dict.fromkeys(part.tensor for part in group.slices if len(block.shapes[part.tensor]) > 1))


def unit_sums(
    block: BlockLayout,
    group: UnitGroup,
    weights: Mapping[str, Tensor],
    mean: Mapping[str, Tensor],
    square: Mapping[str, Tensor],
) -> TaylorSums:
    """Compute each unit's sums over its rows of the producers and its columns of the consumer."""
    totals = {name: torch.zeros(group.num_units, dtype=torch.float64) for name in _SUMS}
    units_U = torch.arange(group.num_units)
    for part in group.slices:
        if part.tensor not in weight_names(block, group):
            continue
        weight = weights[part.tensor]
        others = [axis for axis in range(weight.ndim) if axis != part.axis]
        first = weight.to(torch.float32) * mean[part.tensor]
        signed_R, first_R = first.sum(others), first.abs().sum(others)
        second = weight.to(torch.float32).square().mul_(square[part.tensor])
        second_R = second.sum(others)
        mixed_R = first.sub_(second, alpha=0.5).abs_().sum(others)
        del first, second
        rows = part.indices(units_U)
        for total_U, sum_R in zip(totals.values(), (signed_R, first_R, second_R, mixed_R), strict=True):
            total_U += sum_R.cpu().to(torch.float64)[rows].reshape(group.num_units, -1).sum(dim=1)
    return TaylorSums(**totals)


def load_taylor(folder: Path, block: int) -> dict[str, TaylorSums]:
    """Group name -> sums of one block, as `taylor_pass` left them."""
    stored = load_found(folder, block)
    groups = dict.fromkeys(name.rpartition(".")[0] for name in stored)
    return {group: TaylorSums(**{name: stored[f"{group}.{name}"] for name in _SUMS}) for group in groups}
