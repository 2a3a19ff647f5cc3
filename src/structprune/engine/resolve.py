"""What is checked and planned of a run from headers and settings alone, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from structprune.architectures.sources.resolve import resolve_model
from structprune.architectures.sources.tokenizer import tokenizer_bytes
from structprune.architectures.stock.model import StockModel
from structprune.checkpoint.folder import check_needed, sort_files
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.pipelines.registry import PIPELINES
from structprune.engine.planning.forecast import Forecast
from structprune.engine.planning.host import make_plan
from structprune.engine.planning.plan import PlanRequest, PrunePlan
from structprune.engine.run.device import device_budget, resolve_device, resolve_dtype
from structprune.engine.streaming.activation_cache import cacheable
from structprune.errors import UnsupportedError
from structprune.files import check_path, expand_user
from structprune.memory import available_bytes
from structprune.methods import METHODS
from structprune.methods.method import Method, SensitivityKind
from structprune.ranks import ALONE, Ranks, ranks_here
from structprune.recipe import Recipe, default_sensitivity_samples
from structprune.solvers import SOLVERS
from structprune.types import UnitGroup, UnitKind

_PROBE_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun:
    """A model and a recipe that go together; no weight has been read."""

    directory: Path
    stock: StockModel
    method: Method
    groups: tuple[UnitGroup, ...]
    """Those in scope."""
    recipe: Recipe
    """Resolved but for what the calibration text and the memory decide."""
    device: torch.device
    dtype: torch.dtype
    kinds: tuple[UnitKind, ...]
    """Of the units in scope, in the order of the forward pass."""
    forecast: Forecast
    ranks: Ranks = ALONE


def check(model: str | Path, recipe: Recipe, ranks: Ranks = ALONE) -> ResolvedRun:
    """Everything that can be checked from headers and settings. Raises a subclass of StructPruneError."""
    if recipe.calibration is not None:
        check_path(recipe.calibration, "the text file")
    method = METHODS.get(recipe.method)
    device = resolve_device(recipe.device)
    device_budget(device, recipe.device_memory)
    head_units = "kv-group" if recipe.scope == "mlp" else recipe.head_units or method.head_units
    opened: list[tuple[Path, StockModel]] = []

    def open_source() -> None:
        directory = resolve_model(str(model))
        stock = StockModel(CheckpointReader(directory), head_units)
        if stock.sliced:
            raise UnsupportedError(
                "the source is a sliced model with shortcut matrices, which no method can prune",
                where=str(directory),
                do="prune the dense model, or a model sliced with --structure uniform",
            )
        check_needed(directory, sort_files(directory, stock.reader.weight_files))
        opened.append((directory, stock))

    # Downloaded or converted once where the ranks share a cache; and what is wrong with it is said once.
    ranks.broadcast(open_source)
    if not ranks.is_first:
        open_source()
    directory, stock = opened[0]
    ranks.check_equal({"source checkpoint": stock.reader.fingerprint(), "kind of device": device.type})
    # Measured where it is not said, so the ranks might find different ones.
    dtype = ranks.broadcast(lambda: resolve_dtype(recipe, device))
    seq_len = min(recipe.seq_len, stock.layout.max_positions)
    recipe = recipe.model_copy(
        update={
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "seq_len": seq_len,
            "sensitivity_samples": recipe.sensitivity_samples or default_sensitivity_samples(seq_len),
        }
    )
    pipeline, asked = PIPELINES.get(method.pipeline), recipe
    recipe, groups = ranks.broadcast(lambda: pipeline.resolve(asked, method, stock))
    kinds: tuple[UnitKind, ...] = tuple(dict.fromkeys(group.kind for group in groups))
    return ResolvedRun(
        directory=directory,
        stock=stock,
        method=method,
        groups=groups,
        recipe=recipe,
        device=device,
        dtype=dtype,
        kinds=kinds,
        forecast=ranks.broadcast(lambda: pipeline.forecast(stock, recipe, kinds)),
        ranks=ranks,
    )


def num_probe(recipe: Recipe) -> int:
    """Calibration windows whose perplexity is reported."""
    return max(1, _PROBE_TOKENS // recipe.seq_len)


def plan_run(resolved: ResolvedRun, num_windows: int) -> PrunePlan:
    """How a run with so many calibration windows goes about it. Raises MemoryBudgetError."""
    recipe, stock, num_ranks = resolved.recipe, resolved.stock, resolved.ranks.size
    memory = recipe.memory
    if memory is None and num_ranks > 1:
        # Of the machine; the ranks on it share what is free.
        memory = available_bytes() * 8 // 10 // ranks_here()
    assert recipe.sensitivity_samples is not None
    sensitivity = resolved.method.sensitivity_for(recipe.allocator or "uniform")
    pipeline, solver = PIPELINES.get(resolved.method.pipeline), SOLVERS.find(recipe.solver)
    request = PlanRequest(
        layout=stock.layout,
        groups=resolved.groups,
        stored_bytes={name: stock.reader.num_bytes([name]) for name in stock.reader.shapes},
        stored_dtypes=stock.reader.dtypes,
        compute_dtype=resolved.dtype,
        num_windows=-(-num_windows // num_ranks),
        seq_len=recipe.seq_len,
        num_probe=min(num_probe(recipe), num_windows),
        needs_statistics=resolved.method.needs_statistics
        or sensitivity in (SensitivityKind.LOSS, SensitivityKind.SCORES),
        needs_sensitivity=sensitivity is SensitivityKind.LOSS,
        needs_scores=sensitivity is SensitivityKind.SCORES,
        needs_weight_gradients=sensitivity is SensitivityKind.TAYLOR,
        follows_dense=recipe.target == "dense-path",
        rehearses=recipe.outer_iterations > 0,
        holds_out=recipe.damping == "auto",
        score=recipe.score or "",
        solves=solver is not None and "consumer" in solver.changes,
        kept={kind: max(counts) for kind, counts in (resolved.forecast.kept or {}).items()},
        tokenizer_bytes=tokenizer_bytes(resolved.directory),
        text_bytes=text.stat().st_size if (text := expand_user(recipe.calibration or "")).is_file() else None,
        num_latents=0 if solver is None else solver.num_latents,
        sensitivity_windows=-(-min(recipe.sensitivity_samples, num_windows) // num_ranks),
        # Where blocks are pruned sublayer by sublayer, from sums of every sublayer's inputs.
        cacheable=cacheable(stock, resolved.kinds, recipe.solver or "")
        if pipeline.by_sublayer and resolved.method.needs_statistics
        else (),
        reload_check=recipe.reload_check,
        num_ranks=num_ranks,
    )
    on_device = device_budget(resolved.device, recipe.device_memory)
    return make_plan(pipeline.request(request, recipe, stock), memory, on_device)
