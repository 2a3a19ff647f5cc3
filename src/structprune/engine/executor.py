"""The block loop: read, measure, decide, solve, write, propagate; one block in memory at a time.

Shape suffixes: N windows, S positions, D hidden size, T tokens, U units.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structprune.allocation import ALLOCATORS
from structprune.allocation.uniform import BlockBudget
from structprune.architectures.stock import BlockInputs, StockModel, compact, producer_norms
from structprune.calibration.context import CalibrationWindows
from structprune.calibration.select import fingerprint
from structprune.calibration.store import FileStore, HiddenStore, MemoryStore
from structprune.checkpoint.reader import CheckpointReader
from structprune.checkpoint.writer import CheckpointWriter
from structprune.engine.observer import Observer
from structprune.engine.planner import LOGIT_TOKENS, PrunePlan
from structprune.engine.propagate import Propagator, observed, tapped
from structprune.errors import NumericalError
from structprune.exporters.uniform import uniform_config, write_companions
from structprune.files import write_json
from structprune.linalg.damped import quadratic_error
from structprune.memory import PeakMeter, format_bytes, release_free_memory
from structprune.methods.method import Method
from structprune.recipe import Recipe
from structprune.report.schema import BlockReport, CalibrationReport, MemoryReport, PruneReport, SizeReport
from structprune.runs.directory import RunDirectory
from structprune.scores import SCORES
from structprune.solvers import SOLVERS
from structprune.statistics import GramAccumulator
from structprune.types import BlockLayout, LayerProblem, SolveResult, UnitGroup

MANIFEST_NAME = "pruning_manifest.json"
REPORT_NAME = "pruning_report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that a run needs, decided and checked before the first weight is read."""

    source: str
    reader: CheckpointReader
    stock: StockModel
    recipe: Recipe
    method: Method
    groups: tuple[UnitGroup, ...]
    plan: PrunePlan
    calibration_name: str
    windows: CalibrationWindows
    num_probe: int
    device: torch.device
    dtype: torch.dtype
    started: float
    """`time.perf_counter()` at the start of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _BlockOutcome:
    tensors: dict[str, Tensor]
    """The pruned block, relative names, stored dtype."""
    reports: list[BlockReport]
    kept: dict[str, list[int]]
    holds_residual: bool
    """The store holds each window's residual stream before the MLP's sum, not the block's input."""


def allocate(job: Job) -> dict[str, list[int]]:
    """Units to keep per block, for each kind in scope."""
    allocator = ALLOCATORS.get(job.method.allocator)
    kept: dict[str, list[int]] = {}
    for group in job.groups:
        budgets = [
            BlockBudget(
                block=block.index,
                kind=group.kind,
                num_units=group.num_units,
                unit_parameters=block.unit_parameters(group),
                module_parameters=block.module_parameters(group),
            )
            for block in job.stock.layout.blocks
        ]
        assert job.recipe.multiple_of is not None
        kept[group.kind] = allocator(budgets, job.recipe.sparsity, job.recipe.multiple_of)
    return kept


def execute(job: Job, run: RunDirectory, meter: PeakMeter, observer: Observer) -> PruneReport:
    """Prune block after block into `run`'s staging directory and turn it into the output.

    Raises NumericalError for weights or activations that are not finite, CheckpointError for unreadable tensors.
    """
    layout = job.stock.layout
    kept_units = allocate(job)
    config = job.stock.resized_config({kind: counts[0] for kind, counts in kept_units.items()})
    staging = run.staging
    run.record("start", recipe=job.recipe.fingerprint(), source=job.reader.fingerprint())

    checkpoint = staging / "checkpoint"
    checkpoint.mkdir()
    writer = CheckpointWriter(checkpoint, len(layout.blocks) + 2)
    num_windows, seq_len = job.windows.ids_NS.shape
    shape = (num_windows, seq_len, layout.hidden_size)
    store: HiddenStore = (
        MemoryStore(shape, job.dtype)
        if job.plan.store == "memory"
        else FileStore(staging / "hidden.bin", shape, job.dtype)
    )
    probe = MemoryStore((job.num_probe, seq_len, layout.hidden_size), job.dtype)
    propagator = _embed(job, store, probe)
    reports: list[BlockReport] = []
    kept_indices: dict[str, dict[str, list[int]]] = {}
    observer.start("prune", len(layout.blocks))
    for block in layout.blocks:
        outcome = _prune_block(job, block, kept_units, propagator, store, probe)
        names = {block.prefix + name: tensor for name, tensor in outcome.tensors.items()}
        shard = writer.write(block.index + 2, names)
        run.record("block", index=block.index, shard=shard)
        cast = {name: tensor.to(job.device, job.dtype) for name, tensor in outcome.tensors.items()}
        module = job.stock.block(block.index, cast, config)
        if outcome.holds_residual:
            with job.stock.mlp_half(module):
                propagator.run(module, block.index, store, write=True)
        else:
            propagator.run(module, block.index, store, write=True)
        reports.extend(outcome.reports)
        kept_indices[str(block.index)] = outcome.kept
        del outcome, names, cast, module
        release_free_memory()
        observer.advance(f"{_block_line(reports[-1])}  memory {format_bytes(meter.peak_so_far())}")

    final_NSD = store.read(0, job.num_probe).clone()
    store.close()
    dense, pruned = _perplexities(job, probe.read(0, job.num_probe), final_NSD)
    _copy_outer(job, writer)
    write_companions(
        job.reader.directory,
        checkpoint,
        uniform_config(job.reader.config, job.groups, {k: c[0] for k, c in kept_units.items()}),
    )
    report = _report(job, run, writer, meter, reports, dense, pruned)
    manifest = {
        "structprune": importlib.metadata.version("structprune"),
        "recipe": job.recipe.model_dump(mode="json"),
        "source_fingerprint": report.source_fingerprint,
        "calibration": report.calibration.model_dump(mode="json"),
        "kept_indices": kept_indices,
        "versions": report.versions,
    }
    write_json(checkpoint / MANIFEST_NAME, manifest)
    write_json(checkpoint / REPORT_NAME, report.to_dict())
    writer.finish()
    # Reads every header back and compares it with the new config: what was written is what stock code expects.
    StockModel(CheckpointReader(checkpoint))
    run.commit(checkpoint)
    return report


def _embed(job: Job, store: HiddenStore, probe: HiddenStore) -> Propagator:
    """Fill both stores with the embedded windows and keep what the stock model passes to its blocks."""
    tensors = {n: t.to(job.device, job.dtype) for n, t in job.reader.read(job.stock.embedding_tensors()).items()}
    ids_NS = job.windows.ids_NS.to(job.device)
    inputs: dict[int, BlockInputs] = {}
    for target, num_windows in ((store, len(ids_NS)), (probe, job.num_probe)):
        for start in range(0, num_windows, job.plan.micro_batch_windows):
            stop = min(start + job.plan.micro_batch_windows, num_windows)
            hidden_BSD, given = job.stock.embed(ids_NS[start:stop], tensors)
            target.write(start, hidden_BSD.cpu())
            inputs.setdefault(stop - start, given)
    del tensors
    release_free_memory()
    return Propagator(inputs, job.plan.micro_batch_windows, job.device)


def _prune_block(
    job: Job,
    block: BlockLayout,
    kept_units: Mapping[str, list[int]],
    propagator: Propagator,
    store: HiddenStore,
    probe: HiddenStore,
) -> _BlockOutcome:
    started = time.perf_counter()
    tensors = job.reader.read(block.shapes, block.prefix)
    module = job.stock.block(block.index, {n: t.to(job.device, job.dtype) for n, t in tensors.items()})
    propagator.run(module, block.index, probe, write=True)
    reports: list[BlockReport] = []
    kept: dict[str, list[int]] = {}
    holds_residual = False
    for group in job.groups:
        gram_II: Tensor | None = None
        # An MLP whose output is simply added: leave its last product out, keep the residual, add the pruned MLP later.
        split = group.kind == "mlp" and group.additive and job.stock.family.attention_module is not None
        if job.method.needs_statistics:
            gram_II = _gram(job, block, module, group, propagator, store, split=split)
            holds_residual = split
        keep_U, result, errors = _decide(job, block, group, tensors, gram_II, kept_units[group.kind][block.index])
        keep_units = torch.nonzero(keep_U).flatten()
        tensors = compact(tensors, group, keep_units)
        tensors[group.consumer.tensor] = result.weight_OK.contiguous()
        kept[group.kind] = keep_units.tolist()
        reports.append(
            BlockReport(
                block=block.index,
                kind=group.kind,
                num_units=group.num_units,
                kept_units=len(keep_units),
                error_mask_only=errors[0],
                error=errors[1],
                status=result.status,
                statistics=dict(result.statistics),
                seconds=time.perf_counter() - started,
            )
        )
    return _BlockOutcome(tensors=tensors, reports=reports, kept=kept, holds_residual=holds_residual)


def _gram(
    job: Job,
    block: BlockLayout,
    module: nn.Module,
    group: UnitGroup,
    propagator: Propagator,
    store: HiddenStore,
    *,
    split: bool,
) -> Tensor:
    """Gram of the consumer's input over all windows; with `split` the store is moved on to the residual stream."""
    accumulator = GramAccumulator(group.num_units * group.width, job.device)
    attach = tapped if split else observed
    with attach(module, group.consumer_module, accumulator.update):
        propagator.run(module, block.index, store, write=split)
    return accumulator.finalize(f"block {block.index} {group.kind}").cpu()


def _decide(
    job: Job, block: BlockLayout, group: UnitGroup, tensors: Mapping[str, Tensor], gram_II: Tensor | None, num_keep: int
) -> tuple[Tensor, SolveResult, tuple[float | None, float | None]]:
    """Score the units, keep the best, solve the consumer. Ties keep the unit with the lower number."""
    weight_OI = tensors[group.consumer.tensor].movedim(group.consumer.axis, -1)
    inputs = weight_OI.shape[1]
    problem = LayerProblem(
        weight_OI=weight_OI,
        gram_II=gram_II if gram_II is not None else torch.eye(inputs),
        num_tokens=job.windows.ids_NS.numel(),
        width=group.width,
        damping=job.recipe.damping,
        producer_norm_U=producer_norms(tensors, group),
    )
    score_U = SCORES.get(job.method.score)(problem)
    if not torch.isfinite(score_U).all():
        raise NumericalError(
            "a score is not finite", where=f"block {block.index} {group.kind}", do="use --dtype float32"
        )
    order = torch.sort(score_U, descending=True, stable=True).indices
    keep_U = torch.zeros(problem.num_units, dtype=torch.bool)
    keep_U[order[:num_keep]] = True
    result = SOLVERS.get(job.method.solver)(problem, keep_U)
    if not torch.isfinite(result.weight_OK).all():
        raise NumericalError(
            "the solver's weight is not finite", where=f"block {block.index} {group.kind}", do="raise damping"
        )
    if gram_II is None:
        return keep_U, result, (None, None)
    kept_K = problem.kept_inputs(keep_U)
    energy = quadratic_error(weight_OI, gram_II)
    masked_OI = weight_OI.float().clone()
    masked_OI[:, kept_K] = 0
    before = quadratic_error(masked_OI, gram_II)
    difference_OI = weight_OI.float().clone()
    difference_OI[:, kept_K] -= result.weight_OK.float()
    after = quadratic_error(difference_OI, gram_II)
    return keep_U, result, (before / energy, after / energy) if energy > 0 else (0.0, 0.0)


@torch.no_grad()
def _perplexities(job: Job, dense_NSD: Tensor, pruned_NSD: Tensor) -> tuple[float, float]:
    """Perplexity of the first `num_probe` calibration windows, dense and pruned, from final hidden states."""
    tensors = job.reader.read(job.stock.head_tensors())
    head = job.stock.head({n: t.to(job.device, job.dtype) for n, t in tensors.items()})
    labels_T = job.windows.ids_NS[: job.num_probe, 1:].reshape(-1).to(job.device)
    result: list[float] = []
    for hidden_NSD in (dense_NSD, pruned_NSD):
        hidden_TD = hidden_NSD[:, :-1].reshape(-1, hidden_NSD.shape[-1]).to(job.device)
        total = 0.0
        for start in range(0, len(hidden_TD), LOGIT_TOKENS):
            logits_TV = head(hidden_TD[start : start + LOGIT_TOKENS]).float()
            total += float(
                nn.functional.cross_entropy(logits_TV, labels_T[start : start + LOGIT_TOKENS], reduction="sum")
            )
        if not math.isfinite(total):
            raise NumericalError(
                "the model's output on the calibration text is NaN or infinite",
                where="dense model" if not result else "pruned model",
                do="use --dtype float32; if it stays, the source checkpoint is damaged",
            )
        mean = total / len(hidden_TD)
        result.append(math.exp(mean) if mean < 700 else math.inf)
    return result[0], result[1]


def _copy_outer(job: Job, writer: CheckpointWriter) -> None:
    """Copy what lies outside the blocks, one tensor at a time where it matters: embeddings first, the rest last."""
    outer = job.stock.layout.outer_tensors
    embeddings = job.stock.embedding_tensors()
    writer.write(1, job.reader.read(embeddings))
    release_free_memory()
    writer.write(writer.num_shards, job.reader.read([name for name in outer if name not in embeddings]))


def _report(
    job: Job,
    run: RunDirectory,
    writer: CheckpointWriter,
    meter: PeakMeter,
    blocks: list[BlockReport],
    dense: float,
    pruned: float,
) -> PruneReport:
    layout = job.stock.layout
    removed = layout.num_parameters - writer.num_parameters
    scope = sum(block.module_parameters(group) for block in layout.blocks for group in job.groups)
    return PruneReport(
        output=str(run.output),
        source=job.source,
        source_fingerprint=job.reader.fingerprint(),
        family=layout.family,
        method=job.method.name,
        recipe=job.recipe,
        device=str(job.device),
        compute_dtype=str(job.dtype).removeprefix("torch."),
        calibration=CalibrationReport(
            name=job.calibration_name,
            description=job.windows.description,
            fingerprint=fingerprint(job.windows),
            num_windows=job.windows.ids_NS.shape[0],
            seq_len=job.windows.ids_NS.shape[1],
            perplexity_windows=job.num_probe,
            dense_perplexity=dense,
            pruned_perplexity=pruned,
        ),
        size=SizeReport(
            parameters_before=layout.num_parameters,
            parameters_after=writer.num_parameters,
            bytes_before=job.reader.file_bytes,
            bytes_after=writer.file_bytes,
            removed_share_of_scope=removed / scope,
            removed_share_of_blocks=removed / layout.block_parameters,
            removed_share_of_model=removed / layout.num_parameters,
        ),
        memory=MemoryReport(
            budget_bytes=job.plan.budget_bytes,
            planned_peak_bytes=job.plan.peak_bytes,
            measured_peak_bytes=meter.peak_so_far(),
            phases=job.plan.phases,
            store=job.plan.store,
            micro_batch_windows=job.plan.micro_batch_windows,
        ),
        blocks=blocks,
        wall_seconds=time.perf_counter() - job.started,
        versions={
            "structprune": importlib.metadata.version("structprune"),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "safetensors": importlib.metadata.version("safetensors"),
            "python": platform.python_version(),
        },
    )


def _block_line(report: BlockReport) -> str:
    error = "" if report.error is None else f"  error {report.error:.4f}"
    return f"block {report.block} {report.kind} {report.kept_units}/{report.num_units}{error}"
