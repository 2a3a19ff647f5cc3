"""What share of each block's weights becomes zero: a pass over the dense model, where an allocator measures it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structprune.architectures.stock.maps import MapStep
from structprune.engine.layerwise.maps import measure_squares
from structprune.engine.passes import BlockPass, Carried, PassState, Visited, run_pass
from structprune.engine.run.context import RunContext
from structprune.engine.streaming.blocks import load_block
from structprune.phases import Phase
from structprune.recipe.elements import ResolvedElements
from structprune.solvers.elements import SHARINGS
from structprune.solvers.elements.shares import MeasuredMap
from structprune.types import BlockLayout


def element_shares(context: RunContext, steps: Sequence[Sequence[MapStep]]) -> list[float]:
    """Return the share of zeros of every block, `steps` the maps of each that are pruned.

    What is measured is kept in the journal. Raises NumericalError for activations that are not finite.
    """
    recipe = context.settings(ResolvedElements)
    sharing = SHARINGS.get(recipe.allocator)
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
