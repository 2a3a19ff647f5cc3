"""One block of the pruning pass: statistics, decision, solve.

Shape suffixes: B windows, S positions, D hidden size, T tokens, U units, I consumer inputs, O outputs, K kept inputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structprune.architectures.units import add_bias, compact, remove_half
from structprune.engine.job import Job
from structprune.engine.measure import Reference, Streams, follow_dense, measure
from structprune.engine.problem import layer_problem
from structprune.engine.refine import refine
from structprune.errors import NumericalError
from structprune.linalg.damped import target_error
from structprune.memory import release_free_memory
from structprune.report.schema import BlockReport
from structprune.scores import SCORES, SELECTORS
from structprune.scores.selection import decision_objective, keep_best, removal_path
from structprune.solvers import ITERATIVE, SOLVERS
from structprune.types import UNIT_KINDS, BlockLayout, LayerProblem, Moments, SolveResult, Surveyed, UnitGroup, UnitKind


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOutcome:
    """A pruned block."""

    tensors: dict[str, Tensor]
    """The pruned block, relative names, stored dtype."""
    reports: list[BlockReport]
    kept: dict[str, list[int]]
    costs: dict[str, Tensor]
    """Kind -> loss that each removal adds, (units,), where it was asked for."""


def prune_block(
    job: Job,
    block: BlockLayout,
    num_keep: Mapping[str, int],
    streams: Streams,
    surveyed: Mapping[str, Surveyed],
    *,
    reprice: bool = False,
) -> BlockOutcome:
    """Measure, decide and solve one half of the block after the other; both streams move on to the block's output.

    Halves that read the same state of the stream are solved against the same output, each with the others as they are
    by then; the streams move once for all of them. With `reprice` the removals of each half are priced again, on the
    pruned model's stream.
    """
    tensors = job.reader.read(block.shapes, block.prefix)
    module = _module(job, block, tensors, {})
    if not job.follows_dense:
        streams.propagator.run(module, block.index, streams.dense, write=True)
    reports: list[BlockReport] = []
    kept: dict[str, list[int]] = {}
    costs: dict[str, Tensor] = {}
    for stage in job.stock.stages:
        halves: list[UnitKind] = [kind for kind in stage if block.has(kind)]
        if not halves:
            continue
        reference = None
        if job.follows_dense:
            measured = [block.group(kind) for kind in halves if num_keep.get(kind, 0) > 0]
            reference = follow_dense(job, block, stage, measured, module, streams)
        for kind in halves:
            if kind not in num_keep:
                continue
            if num_keep[kind] == 0:
                half = _remove(block, kind, tensors)
            else:
                half = _prune_half(
                    job,
                    block,
                    block.group(kind),
                    module,
                    streams,
                    reference,
                    tensors,
                    num_keep[kind],
                    surveyed.get(kind),
                    kept,
                    reprice=reprice,
                )
            tensors, kept[kind] = half.tensors, half.keep_units
            reports.append(half.report)
            if half.cost_U is not None:
                costs[kind] = half.cost_U
            module = _module(job, block, tensors, kept)
        with job.stock.stage(module, stage):
            streams.propagator.run(module, block.index, streams.pruned, write=True)
    return BlockOutcome(tensors=tensors, reports=reports, kept=kept, costs=costs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Half:
    """One half of a block, decided and solved."""

    tensors: dict[str, Tensor]
    """All of the block's."""
    keep_units: list[int]
    report: BlockReport
    cost_U: Tensor | None = None


def _remove(block: BlockLayout, kind: UnitKind, tensors: Mapping[str, Tensor]) -> _Half:
    """The whole half goes."""
    report = BlockReport(
        block=block.index,
        kind=kind,
        num_units=block.group(kind).num_units,
        kept_units=0,
        error_mask_only=None,
        error=None,
        status="removed",
        statistics={},
        objective=[],
        seconds=0.0,
    )
    return _Half(tensors=remove_half(tensors, block, kind), keep_units=[], report=report)


def _prune_half(
    job: Job,
    block: BlockLayout,
    group: UnitGroup,
    module: nn.Module,
    streams: Streams,
    reference: Reference | None,
    tensors: Mapping[str, Tensor],
    num_keep: int,
    surveyed: Surveyed | None,
    kept: Mapping[str, list[int]],
    *,
    reprice: bool,
) -> _Half:
    """Some units go. The pruned stream stays at the half's input; `kept` is what came first."""
    started = time.perf_counter()
    measured: list[Moments] = []
    if job.method.needs_statistics:
        measured = [measure(job, block, group, module, streams, w, reference) for w in job.window_parts]
    problem = layer_problem(job, block, group, tensors, measured, surveyed)
    context = _context(problem, measured)
    # The sums of all windows and of the held-out ones are in the problem; those of the others would be a third.
    measured.clear()
    # Freed activations would otherwise stay in the heap, in holes that no matrix fits into.
    release_free_memory()
    keep_U, result = _decide(job, problem, num_keep, f"block {block.index} {group.kind}")
    decision = _decision_objectives(job, problem, keep_U)
    errors = _relative_errors(problem, keep_U, result) if job.method.needs_statistics else (None, None)
    cost_U = removal_path(problem, group.num_units).cost if reprice else None
    del problem
    keep_units = torch.nonzero(keep_U).flatten()
    cut = compact(tensors, group, keep_units)
    # Solved unit after unit; in the tensor the kept inputs keep their order.
    order_K = torch.argsort(group.consumer.indices(keep_units))
    cut[group.consumer.tensor] = result.weight_OK[:, order_K].movedim(-1, group.consumer.axis).contiguous()
    if result.bias_O is not None:
        cut = add_bias(cut, group, result.bias_O)
    statistics: dict[str, float] = context | decision | dict(result.statistics)
    objective: list[float] = []
    if group.kind == "mlp" and job.solver in ITERATIVE and 0 < len(keep_units) < group.num_units:
        pruned = _module(job, block, cut, {**kept, group.kind: keep_units.tolist()})
        refined = refine(job, block, group, pruned, module, streams, reference, cut, result)
        cut, objective = refined.tensors, refined.objective
        statistics |= refined.statistics
    report = BlockReport(
        block=block.index,
        kind=group.kind,
        num_units=group.num_units,
        kept_units=len(keep_units),
        error_mask_only=errors[0],
        error=errors[1],
        status=result.status,
        statistics=statistics,
        objective=objective,
        seconds=time.perf_counter() - started,
    )
    return _Half(tensors=cut, keep_units=keep_units.tolist(), report=report, cost_U=cost_U)


def _context(problem: LayerProblem, measured: Sequence[Moments]) -> dict[str, float]:
    """What the report says of the place in the stream: energies per token and how much the loss depends on it."""
    found: dict[str, float] = {}
    if measured:
        found["residual_energy"] = sum(part.residual_energy for part in measured) / problem.num_tokens
    if problem.target_energy is not None:
        found["target_energy"] = problem.target_energy / problem.num_tokens
    if problem.sensitivity_OO is not None:
        found["sensitivity"] = float(problem.sensitivity_OO.diagonal().sum(dtype=torch.float64))
    return found


def _module(job: Job, block: BlockLayout, tensors: Mapping[str, Tensor], kept: Mapping[str, list[int]]) -> nn.Module:
    """The stock layer with the units that are left, in the dtype of the forward passes."""
    # Before a half is solved its tensors are the source's, and so is its bias or the lack of one.
    biased: list[UnitKind] = [kind for kind in UNIT_KINDS if kept.get(kind) and job.adds_bias]
    widths = {kind: len(units) for kind, units in kept.items()}
    config = job.stock.resized_config(widths, block.index, biased)
    cast = {name: tensor.to(job.device, job.dtype) for name, tensor in tensors.items()}
    removed: list[UnitKind] = [kind for kind in UNIT_KINDS if kept.get(kind) == []]
    return job.stock.block(block.index, cast, config, removed)


def _decide(job: Job, problem: LayerProblem, num_keep: int, where: str) -> tuple[Tensor, SolveResult]:
    """Choose the units, solve the consumer."""
    if job.score in SELECTORS:
        keep_U = SELECTORS.get(job.score)(problem, num_keep)
    else:
        score_U = SCORES.get(job.score)(problem)
        if not torch.isfinite(score_U).all():
            raise NumericalError("a score is not finite", where=where, do="the source checkpoint may be damaged")
        keep_U = keep_best(score_U, num_keep)
    release_free_memory()
    result = SOLVERS.get(job.solver)(problem, keep_U)
    if not torch.isfinite(result.weight_OK).all():
        raise NumericalError("the solver's weight is not finite", where=where, do="raise --damping")
    return keep_U, result


def _decision_objectives(job: Job, problem: LayerProblem, keep_U: Tensor) -> dict[str, float]:
    """What a search for the units was worth: its objective, and that of as many units by their own output energy."""
    if job.score not in SELECTORS or bool(keep_U.all()):
        return {}
    ranked_U = keep_best(SCORES.get("l2")(problem), int(keep_U.sum()))
    return {
        "decision_objective_l2": decision_objective(problem, ranked_U),
        "decision_objective": decision_objective(problem, keep_U),
    }


def _relative_errors(problem: LayerProblem, keep_U: Tensor, result: SolveResult) -> tuple[float, float]:
    """Squared error over target energy, of the cut weight and of the solved one, on the calibration tokens."""
    kept_K = problem.kept_inputs(keep_U)
    cross_OI = problem.cross_OI
    energy = problem.target_energy
    if energy is None:
        energy = float((cross_OI * problem.weight_OI).sum(dtype=torch.float64))
    if energy <= 0:
        return 0.0, 0.0
    gram_KK = problem.gram_II[kept_K][:, kept_K]
    before = target_error(problem.weight_OI[:, kept_K], gram_KK, cross_OI[:, kept_K], energy)
    after = target_error(result.weight_OK, gram_KK, cross_OI[:, kept_K], energy)
    if result.bias_O is not None:
        # The bias is the mean of what is missing, so it takes exactly its own energy away.
        after = max(0.0, after - problem.num_tokens * float(result.bias_O.square().sum(dtype=torch.float64)))
    return before / energy, after / energy
