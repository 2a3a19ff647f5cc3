"""What share of each map's weights becomes zero: a pass over the dense model, where an allocator measures it.

Shape suffixes: P measured shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from structprune.allocation.knapsack import dynamic_programming
from structprune.allocation.menu import Budget, Slot, Variant
from structprune.architectures.stock.maps import MapStep
from structprune.engine.layerwise.maps import measure_squares
from structprune.engine.passes import BlockPass, Carried, PassState, Visited, run_pass
from structprune.engine.run.context import RunContext
from structprune.engine.sensitivity.map_costs import map_costs
from structprune.engine.sensitivity.store import SURVEY
from structprune.engine.streaming.blocks import load_block
from structprune.patterns import as_pattern
from structprune.phases import Phase
from structprune.recipe.elements import ResolvedElements
from structprune.solvers.elements import SHARINGS
from structprune.solvers.elements.shares import MeasuredMap, Sharing
from structprune.types import BlockLayout, UnitKind

# Measured shares are so far apart, and chosen ones.
_COST_STEP, _SHARE_STEP = 0.05, 0.01


def element_shares(context: RunContext, steps: Sequence[Sequence[MapStep]]) -> list[dict[str, float]]:
    """Return the share of zeros of every map of every block, `steps` the maps of each that are pruned.

    What is measured is kept beside the journal, or in it. Raises NumericalError for activations that are not finite.
    """
    recipe = context.settings(ResolvedElements)
    sharing, blocks = SHARINGS.get(recipe.allocator), context.stock.layout.blocks
    if sharing.by_loss:
        return _shares_by_loss(context, steps, sharing.reach)
    return [
        dict.fromkeys(_maps(steps, block), share)
        for block, share in zip(blocks, _block_shares(context, steps, sharing), strict=True)
    ]


def _shares_by_loss(context: RunContext, steps: Sequence[Sequence[MapStep]], reach: float) -> list[dict[str, float]]:
    """Choose the shares of all maps that add least to the loss, in steps of a hundredth, by dynamic programming."""
    recipe, blocks = context.settings(ResolvedElements), context.stock.layout.blocks
    half = round(reach / _COST_STEP)
    measured = [recipe.sparsity + _COST_STEP * number for number in range(-half, half + 1)]
    patterns = [as_pattern(recipe.pattern, share, context.method.counts) for share in measured]
    costs = map_costs(context, steps, patterns, context.run.staging / SURVEY)
    half = round(reach / _SHARE_STEP)
    shares = [recipe.sparsity + _SHARE_STEP * number for number in range(-half, half + 1)]
    kinds: dict[str, UnitKind] = {}
    for step in (step for own in steps for step in own):
        kinds.update({name: step.kind for group in step.groups for name in group.maps})
    slots: list[Slot] = []
    total = 0
    for block in blocks:
        for name in _maps(steps, block):
            size = math.prod(block.shapes[f"{name}.weight"])
            total += size
            found = between(measured, costs[block.index][name].tolist(), shares)
            kept = [size - round(share * size) for share in shares]
            variants = [Variant(keep=one, cost=(one,), price=each) for one, each in zip(kept, found, strict=True)]
            slots.append(Slot(block=block.index, kind=kinds[name], variants=tuple(variants)))
    choice = iter(dynamic_programming(slots, Budget(at_most=(total - round(recipe.sparsity * total),))))
    return [{name: shares[next(choice)] for name in _maps(steps, block)} for block in blocks]


def between(measured: Sequence[float], costs: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Return the costs of other shares, on straight lines in their logarithm."""
    logarithms = np.log(np.maximum(costs, np.finfo(np.float64).tiny))
    return np.exp(np.interp(shares, measured, logarithms)).tolist()


def _block_shares(context: RunContext, steps: Sequence[Sequence[MapStep]], sharing: Sharing) -> list[float]:
    """Return the share of zeros of every block, from one number of each."""
    recipe = context.settings(ResolvedElements)
    blocks = context.stock.layout.blocks
    weights = [sum(math.prod(block.shapes[f"{name}.weight"]) for name in _maps(steps, block)) for block in blocks]
    if sharing.measure is None:
        return sharing.shares([], weights, recipe.sparsity)
    measure = sharing.measure

    def visit(block: BlockLayout, state: PassState) -> Visited:
        tensors, module = load_block(context, block)
        transposed = context.stock.family.inputs_first
        with context.meter.phase(Phase.SENSITIVITY_SCORES):
            squares = measure_squares(
                context, block, module, steps[block.index], state.propagator, state.stores["hidden"]
            )
            del module
            maps = [
                MeasuredMap(
                    weight_OI=tensors[f"{name}.weight"].T if transposed else tensors[f"{name}.weight"],
                    energy_I=squares[name].cpu(),
                )
                for name in _maps(steps, block)
            ]
            found = measure(maps) if maps else 0.0
        return Visited(carried=Carried(values={"numbers": [*state.carried.values.get("numbers", []), found]}))

    def finish(state: PassState) -> dict[str, Tensor]:
        return {"numbers": torch.tensor(state.carried.values["numbers"], dtype=torch.float64)}

    result = run_pass(
        context,
        BlockPass(
            name=str(Phase.SENSITIVITY_SCORES),
            journal=context.run.journal,
            stores={"hidden": len(context.windows.ids_NS)},
            visit=visit,
            finish=finish,
            records_blocks=False,
            last="shares",
            snapshots="shares",
        ),
    )
    numbers = result.final["numbers"].tolist()
    # Blocks without a map in scope have no part in it.
    own = [place for place, count in enumerate(weights) if count]
    shares = sharing.shares([numbers[place] for place in own], [weights[place] for place in own], recipe.sparsity)
    found = dict(zip(own, shares, strict=True))
    return [found.get(place, recipe.sparsity) for place in range(len(weights))]


def _maps(steps: Sequence[Sequence[MapStep]], block: BlockLayout) -> list[str]:
    return [name for step in steps[block.index] for group in step.groups for name in group.maps]
