"""What the widths of a sublayer are solved from: sums of the consumer's inputs, and the order in which its units go.

One pass of the dense model over the windows that are fitted. Each group leaves a file beside the journal.

Shape suffixes: U units, I consumer inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from structprune.engine.layerwise.few_tokens import with_missing_tokens
from structprune.engine.layerwise.problem import layer_problem
from structprune.engine.passes import BlockPass, Line, PassState, Visited, run_pass
from structprune.engine.run.context import RunContext
from structprune.engine.sensitivity.cache import SensitivityPass
from structprune.engine.sensitivity.fisher import moments_of, summed_inputs
from structprune.engine.streaming.blocks import load_block
from structprune.errors import NumericalError
from structprune.memory import release_free_memory
from structprune.phases import Phase, SublayerPhase
from structprune.runs.journal import Journal
from structprune.scores import SCORES, SELECTORS
from structprune.scores.selection import removal_order, removal_path
from structprune.types import BlockLayout, LayerProblem, Moments, UnitGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatistics:
    """What was measured of one group of units."""

    moments: Moments
    order_U: Tensor
    """Units in the order in which they go."""
    price_U: Tensor
    """What each removal adds, in that order, float64; a score where no loss was measured."""


def measure_statistics(context: RunContext, journal: Journal, found: SensitivityPass) -> None:
    """Measure every group of the context's model over all of its windows, or what is left to do of it.

    Raises NumericalError for activations that are not finite, CheckpointError for unreadable tensors.
    """

    def visit(block: BlockLayout, state: PassState) -> Visited:
        tensors, module = load_block(context, block)
        with context.meter.phase(Phase.SEARCH_STATISTICS), summed_inputs(context, block, module) as sums:
            state.propagator.run(module, block.index, state.stores["dense"])
        del module
        release_free_memory()
        sensitivity = found.of_block(block.index)
        files: dict[str, dict[str, Tensor]] = {}
        for group in context.groups(block):
            accumulator = sums.pop(group.name)
            num_tokens = accumulator.num_tokens
            with context.meter.phase(SublayerPhase.SEARCH_ORDER.of(group.kind)):
                moments = moments_of(accumulator, f"block {block.index} {group.name}", num_tokens)
                del accumulator
                problem = layer_problem(
                    context, block, group, tensors, [moments], sensitivity.get(group.name, sensitivity.get(group.kind))
                )
                if group.expert is not None:
                    problem = with_missing_tokens(problem)
                try:
                    order_U, price_U = _order(context, problem)
                except NumericalError as error:
                    raise error.inside(f"block {block.index} {group.name}") from error
                del problem
            assert moments.sum_I is not None
            files[_name(block, group)] = {
                "gram_II": moments.gram_II[:].cpu(),
                "sum_I": moments.sum_I.cpu(),
                "num_tokens": torch.tensor(num_tokens),
                "order_U": order_U.cpu(),
                "price_U": price_U.cpu(),
            }
            release_free_memory()
        return Visited(files=files)

    def replay(block: BlockLayout, line: Line, state: PassState) -> None:
        state.propagator.run(load_block(context, block)[1], block.index, state.stores["dense"])

    run_pass(
        context,
        BlockPass(
            name="search: statistics",
            journal=journal,
            stores={"dense": len(context.windows.ids_NS)},
            visit=visit,
            replay=replay,
        ),
    )


def load_statistics(folder: Path, block: BlockLayout, group: UnitGroup) -> GroupStatistics:
    """Load what was measured of one group."""
    stored = load_file(folder / _name(block, group))
    return GroupStatistics(
        moments=Moments(gram_II=stored["gram_II"], num_tokens=int(stored["num_tokens"]), sum_I=stored["sum_I"]),
        order_U=stored["order_U"],
        price_U=stored["price_U"],
    )


def _name(block: BlockLayout, group: UnitGroup) -> str:
    return f"statistics-{block.index}-{group.name}.safetensors"


def _order(context: RunContext, problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """Order the units as the method would remove them: (units, what each removal adds)."""
    if context.score in SELECTORS:
        path = removal_path(problem, problem.num_units)
        return path.order, path.cost.to(torch.float64)
    score_U = SCORES.get(context.score).score(problem)
    if not torch.isfinite(score_U).all():
        raise NumericalError("a score is not finite", do="the source checkpoint may be damaged")
    order_U = removal_order(score_U, problem.partitions)
    return order_U, score_U[order_U].to(torch.float64)
