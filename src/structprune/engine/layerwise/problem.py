"""One sublayer of a block as all that scores and solvers may see.

Shape suffixes: I consumer inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from structprune.architectures.units import producer_norms
from structprune.engine.run.context import RunContext
from structprune.types import UNIT_KINDS, BlockLayout, LayerProblem, Moments, Sensitivity, UnitGroup


def layer_problem(
    context: RunContext,
    block: BlockLayout,
    group: UnitGroup,
    tensors: Mapping[str, Tensor],
    measured: Sequence[Moments],
    sensitivity: Sensitivity | None = None,
) -> LayerProblem:
    """Build the consumer's problem from what was measured over the fitted windows and, if any are, the held-out ones.

    Behind the first, `measured` has the held-out windows of all texts, or those of each. Inputs are ordered unit after
    unit. All tensors are on the device where the plan has the problem solved.
    """
    where = context.solve_device
    sensitivity = (sensitivity or Sensitivity()).to(where)
    order_I = group.consumer.indices(torch.arange(group.num_units))
    weight_OI = tensors[group.consumer.tensor].movedim(group.consumer.axis, -1)[:, order_I].to(where)
    measured = [part.to(where) for part in measured]
    if group.consumer.repeat > 1:
        measured = [part.reordered(order_I.to(where)) for part in measured]
    if not measured:
        # Nothing reads it, and the plan has no bytes for it: zeros without memory of their own.
        measured = [Moments(gram_II=torch.zeros((), device=where).expand(len(order_I), len(order_I)), num_tokens=1)]
    fit, *held_out = measured
    return LayerProblem(
        weight_OI=weight_OI,
        fit=fit,
        held_out=reduce(Moments.__add__, held_out) if held_out else None,
        held_out_by_text=held_out if len(held_out) > 1 else (),
        width=group.width,
        partitions=group.partitions,
        damping=context.damping,
        shrinkage=context.shrinkage,
        producer_norms_MU=producer_norms(tensors, group).to(where),
        seed=context.recipe.seed * 1_000_003
        + (group.expert or 0) * 10_007
        + block.index * len(UNIT_KINDS)
        + UNIT_KINDS.index(group.kind),
        sensitivity_OO=sensitivity.sensitivity_OO,
        taylor=sensitivity.taylor,
    )
