"""What gates begin with: each sublayer's order of removal, and stand-ins for the units that may go.

Both are measured on the dense model, in one pass over the windows that teach. A stand-in is the ridge regression of a
unit's activations on those of the units that stay in any case, so that the gated model is near to what it will be once
its consumers are solved again; units with the same removal that others can make up for then cost as little as they do.

Shape suffixes: U units, I consumer inputs, C inputs that always stay, R all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from structprune.allocation.gates import GateProblem
from structprune.engine.layerwise.problem import layer_problem
from structprune.engine.passes import BlockPass, PassState, Visited, run_pass
from structprune.engine.run.context import RunContext
from structprune.engine.sensitivity.fisher import moments_of, summed_inputs
from structprune.engine.sensitivity.store import load_found
from structprune.engine.streaming.blocks import load_block
from structprune.engine.streaming.gated import StandIns
from structprune.errors import NumericalError
from structprune.linalg.cholesky import damped_cholesky, solved
from structprune.linalg.gram_products import block_of
from structprune.memory import release_free_memory
from structprune.phases import Phase, SublayerPhase
from structprune.runs.journal import Journal
from structprune.scores import SCORES, SELECTORS
from structprune.scores.selection import removal_path
from structprune.types import BlockLayout, LayerProblem, Sensitivity, UnitGroup, UnitKind

Place = tuple[int, UnitKind]
"""(block, kind) of a sublayer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where what the pass measured lies."""

    folder: Path

    def order_U(self, block: int, kind: UnitKind) -> Tensor:
        """Return the sublayer's units in the order in which it would lose them."""
        return load_file(self._path(block))[f"{kind}.order"]

    def stand_ins(self, block: int, kind: UnitKind) -> StandIns | None:
        """Return what stands in for its units; None where none can."""
        stored = load_file(self._path(block))
        if f"{kind}.weight" not in stored:
            return None
        core, rest, weight = (stored[f"{kind}.{name}"] for name in ("core", "rest", "weight"))
        return StandIns(core_C=core, rest_R=rest, weight_CR=weight)

    def _path(self, block: int) -> Path:
        return self.folder / file_name(block)


def file_name(block: int) -> str:
    """Return the name of the file of one block."""
    return f"gates-{block}.safetensors"


def measure_start(
    context: RunContext, folder: Path, windows: Sequence[int], problem: GateProblem, sensitivities: Path
) -> Start:
    """Measure the dense model on these windows into `folder`, or find what an interrupted process measured there.

    `sensitivities` is the folder of the sensitivity pass. Raises NumericalError for what is not finite.
    """
    taught = context.on_windows(tuple(windows))
    always = _always(problem)

    def visit(block: BlockLayout, state: PassState) -> Visited:
        found = load_found(sensitivities, block.index)
        tensors, module = load_block(taught, block)
        with context.meter.phase(Phase.GATES), summed_inputs(taught, block, module) as sums:
            state.propagator.run(module, block.index, state.stores["gates"])
        del module
        release_free_memory()
        files: dict[str, Tensor] = {}
        for group in context.groups(block):
            where = f"block {block.index} {group.name}"
            with context.meter.phase(SublayerPhase.REMOVAL_COSTS.of(group.kind)):
                total = sums.pop(group.name)
                moments = moments_of(total, where, total.num_tokens)
                sensitivity = Sensitivity(sensitivity_OO=found[group.kind])
                one = layer_problem(taught, block, group, tensors, [moments], sensitivity)
                try:
                    part = _of_group(context, one, group, always[block.index, group.kind])
                except NumericalError as error:
                    raise error.inside(where) from error
                files |= {f"{group.kind}.{name}": tensor.cpu().contiguous() for name, tensor in part.items()}
                del one, moments, total
        return Visited(files={file_name(block.index): files})

    with contextlib.closing(Journal(folder, context.observer.note)) as journal:
        run_pass(taught, BlockPass(name="gates: start", journal=journal, stores={"gates": len(windows)}, visit=visit))
    return Start(folder=folder)


def _always(problem: GateProblem) -> Mapping[Place, Tensor]:
    """Return, for each sublayer, which of its units stay whatever is learned, in order of removal."""
    stays_U = ~problem.free_U & (problem.start_U > 0)
    parts = problem.parts(stays_U)
    return {(budget.block, budget.kind): part for budget, part in zip(problem.budgets, parts, strict=True)}


def _of_group(context: RunContext, problem: LayerProblem, group: UnitGroup, always_U: Tensor) -> Mapping[str, Tensor]:
    """Find the order of removal, and stand-ins by the units that stay in any case, the last ones of that order."""
    if context.score in SELECTORS:
        order_U = removal_path(problem, group.num_units).order.cpu()
    else:
        order_U = SCORES.get(context.score).score(problem).cpu().sort(stable=True).indices
    found = {"order": order_U}
    stays_U = torch.zeros(group.num_units, dtype=torch.bool)
    stays_U[order_U[always_U]] = True
    core_C, rest_R = problem.kept_inputs(stays_U), problem.kept_inputs(~stays_U)
    if not len(core_C) or not len(rest_R):
        return found
    where = problem.device
    # The problem has its inputs unit after unit; the consumer has them as they are.
    input_I = group.consumer.indices(torch.arange(group.num_units))
    weight_CR = _predictors(problem, core_C.to(where), rest_R.to(where))
    return found | {"core": input_I[core_C], "rest": input_I[rest_R], "weight": weight_CR.float()}


def _predictors(problem: LayerProblem, core_C: Tensor, rest_R: Tensor) -> Tensor:
    """Compute (G_CC + delta I)^-1 G_CR, the ridge regression of inputs R on inputs C, float64."""
    gram_II = problem.total().gram_II
    factor = damped_cholesky(lambda: block_of(gram_II, core_C, core_C), problem.damping, "stand-ins")
    return solved(factor.factor_NN, block_of(gram_II, rest_R, core_C)).T
