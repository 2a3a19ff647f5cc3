"""The library's entry points: check everything, then work."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from torch import Tensor

from structprune.allocation import ALLOCATORS
from structprune.architectures.sampler import sample_windows
from structprune.architectures.source import resolve_model
from structprune.architectures.stock import StockModel, check_bias, load_model
from structprune.architectures.tokenizer import TextEncoder
from structprune.calibration.context import CalibrationWindows, SourceContext
from structprune.calibration.select import load_windows
from structprune.calibration.sources.file import read_text
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.device import resolve_device, resolve_dtype
from structprune.engine.executor import execute
from structprune.engine.job import Job
from structprune.engine.observer import Observer, SilentObserver
from structprune.engine.planner import PlanRequest, PrunePlan, make_plan
from structprune.engine.slice_settings import kept_width, resolve_slice_settings
from structprune.engine.slicing import execute_slice
from structprune.errors import InputError, UnsupportedError
from structprune.evaluation.perplexity import PerplexityResult, perplexity
from structprune.memory import PeakMeter, format_budget, format_bytes
from structprune.methods import METHODS
from structprune.methods.method import Method
from structprune.recipe import Recipe
from structprune.report.schema import PruneReport
from structprune.runs.directory import RunDirectory
from structprune.scores import SCORES, SELECTORS
from structprune.solvers import ITERATIVE
from structprune.types import UNIT_KINDS, ModelLayout, UnitGroup

_PROBE_TOKENS = 2048
_NARROW = 4096


def prune(model: str | Path, recipe: Recipe, output: str | Path, observer: Observer | None = None) -> PruneReport:
    """Prune `model` (directory, hub id, .gguf file or `smollm2`) by `recipe` into the new directory `output`.

    Every input is checked before the first weight is read. Raises a subclass of StructPruneError that says what to
    do; nothing half-written stays behind.
    """
    started = time.perf_counter()
    observer = observer or SilentObserver()
    method = METHODS.get(recipe.method)
    device = resolve_device(recipe.device)
    run = RunDirectory(Path(output))
    run.check()
    directory = resolve_model(str(model))
    reader = CheckpointReader(directory)
    stock = StockModel(reader, recipe.head_units if recipe.scope != "mlp" else "kv-group")
    if stock.sliced:
        raise UnsupportedError(
            "the source is a sliced model with shortcut matrices, which no method can prune",
            where=str(directory),
            do="prune the dense model, or a model sliced with --structure uniform",
        )
    width = 0
    if method.walk == "slice":
        groups = stock.groups
        recipe = resolve_slice_settings(recipe, method, stock)
        assert stock.family.stream is not None
        width = kept_width(stock.layout, stock.family.stream, recipe)
    else:
        groups = _groups_in_scope(method, recipe, stock)
        if (recipe.solver or method.solver) == "bias":
            for group in groups:
                check_bias(group)
    dtype = resolve_dtype(recipe, device)
    recipe = recipe.model_copy(
        update={
            "multiple_of": recipe.multiple_of or default_multiple(groups),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "seq_len": min(recipe.seq_len, stock.layout.max_positions),
        }
    )
    if method.walk == "units":
        recipe = _resolve_method_settings(recipe, method, stock)
    num_probe = max(1, _PROBE_TOKENS // recipe.seq_len)

    def plan_for(num_windows: int) -> PrunePlan:
        request = PlanRequest(
            layout=stock.layout,
            groups=groups,
            stored_bytes={name: reader.num_bytes([name]) for name in reader.shapes},
            compute_dtype=dtype,
            num_windows=num_windows,
            seq_len=recipe.seq_len,
            num_probe=min(num_probe, num_windows),
            needs_statistics=method.needs_statistics,
            needs_survey=method.survey == "loss",
            follows_dense=recipe.target == "dense-path",
            holds_out=recipe.damping == "auto",
            iterates=recipe.solver in ITERATIVE,
            sensitivity_windows=min(recipe.sensitivity_samples, num_windows),
            slices="no" if not width else "one basis" if recipe.structure == "uniform" else "bases",
            sliced_hidden=width,
        )
        return make_plan(request, recipe.memory)

    with PeakMeter() as meter:
        plan = plan_for(recipe.num_samples)
        name, windows = _windows(directory, recipe, plan, device, dtype, observer)
        _check_disk(run, plan)
        num_windows = len(windows.ids_NS)
        if num_windows < recipe.num_samples:
            plan = plan_for(num_windows)
        job = Job(
            source=str(model),
            reader=reader,
            stock=stock,
            recipe=recipe.model_copy(
                update={"calibration": name, "num_samples": num_windows, "memory": plan.budget_bytes}
            ),
            method=method,
            kinds=tuple(group.kind for group in groups),
            plan=plan,
            calibration_name=name,
            windows=windows,
            num_probe=min(num_probe, num_windows),
            device=device,
            dtype=dtype,
            started=started,
        )
        with run:
            walk = execute_slice if method.walk == "slice" else execute
            return walk(job, run, meter, observer)


def _resolve_method_settings(recipe: Recipe, method: Method, stock: StockModel) -> Recipe:
    """Fill what the recipe leaves to the method. Raises UnsupportedError for combinations without a meaning."""
    allocator = ALLOCATORS.check(recipe.allocator or ("uniform" if recipe.structure == "uniform" else method.allocator))
    temperature = recipe.temperature
    if temperature is None:
        temperature = method.temperature if allocator == method.allocator else 0.0
    # Nothing removed leaves nothing to correct: the dense path is the model's own.
    target = (recipe.target or method.target) if recipe.sparsity > 0 else "local"
    num_protected = recipe.protect_first + recipe.protect_last
    if num_protected and num_protected >= len(stock.layout.blocks):
        raise InputError(
            "every block is protected",
            got=f"--protect-first {recipe.protect_first}, --protect-last {recipe.protect_last}",
            wanted=f"fewer than {len(stock.layout.blocks)} together",
        )
    score = _check_score(recipe.score or method.score, method)
    solver = recipe.solver or method.solver
    if solver == "bias" and recipe.sparsity == 0:
        # Nothing is missing, so nothing is added.
        solver = "mask-only"
    damping = recipe.damping or method.damping
    if solver != "mask-only" and not method.needs_statistics:
        raise UnsupportedError(
            f"method {method.name!r} measures nothing that a solver could use", wanted="--solver mask-only"
        )
    if solver in ITERATIVE and damping != "auto":
        raise UnsupportedError(
            f"solver {solver!r} is judged on held-out windows",
            got=f"--damping {damping:g}",
            wanted="--damping auto",
        )
    if damping == "auto" and recipe.num_samples < 2 and method.needs_statistics:
        raise InputError(
            "one window cannot both fit and choose the ridge",
            got=f"--num-samples {recipe.num_samples}, --damping auto",
            wanted="at least 2 windows, or a number for --damping",
        )
    if num_protected and recipe.structure == "uniform":
        raise UnsupportedError("protected blocks keep another width than the others", wanted="--structure per-layer")
    uneven = num_protected > 0 or any(block.groups != stock.groups for block in stock.layout.blocks)
    if allocator != "uniform" and method.survey == "none":
        raise UnsupportedError(
            f"allocator {allocator!r} needs removal costs, which {method.name!r} does not measure",
            wanted="--allocator uniform, or --method structprune",
        )
    if allocator not in ("uniform", "standardised") and method.survey == "scores":
        raise UnsupportedError(
            f"allocator {allocator!r} compares costs in units of the loss, which {method.name!r} does not measure",
            wanted="--allocator standardised or uniform, or --method structprune",
        )
    if uneven and recipe.structure == "uniform":
        raise UnsupportedError("the source's blocks have different widths", wanted="--structure per-layer")
    if allocator != "uniform" and recipe.structure == "uniform":
        raise UnsupportedError(
            f"allocator {allocator!r} gives every block its own width",
            wanted="--structure per-layer or --allocator uniform",
        )
    if target == "dense-path" and solver == "bias":
        raise UnsupportedError("solver 'bias' makes up for removed inputs only", wanted="--target local")
    if target == "dense-path" and not method.needs_statistics:
        raise UnsupportedError(f"method {method.name!r} solves nothing, so it has no target", wanted="--target local")
    if recipe.outer_iterations and allocator == "uniform":
        raise UnsupportedError(
            "the uniform allocator reads no prices, so an outer iteration changes nothing",
            got=f"--outer-iterations {recipe.outer_iterations}",
            wanted="an allocator that weighs blocks, such as closed-form",
        )
    if recipe.allow_block_removal and allocator == "uniform":
        raise UnsupportedError(
            "the uniform allocator takes the same share of every block, so it removes none",
            got="--allow-block-removal",
            wanted="an allocator that weighs blocks, such as closed-form",
        )
    return recipe.model_copy(
        update={
            "allocator": allocator,
            "temperature": temperature,
            "target": target,
            "structure": recipe.structure or ("uniform" if allocator == "uniform" and not uneven else "per-layer"),
            "damping": damping,
            "score": score,
            "solver": solver,
        }
    )


def _check_score(score: str, method: Method) -> str:
    """`score` if `method` measures what it reads. Raises InputError for an unknown name, UnsupportedError else."""
    (SCORES | SELECTORS).check(score)
    if score != method.score and not method.needs_statistics:
        raise UnsupportedError(
            f"method {method.name!r} measures nothing that a score could read", wanted=f"--score {method.score}"
        )
    if method.survey == "scores" and score in SELECTORS:
        raise UnsupportedError(
            f"{score!r} gives no number per unit that blocks could be compared by", wanted=f"--score {method.score}"
        )
    if score == "loss" and method.survey != "loss":
        raise UnsupportedError(
            f"score 'loss' needs the output sensitivity, which {method.name!r} does not measure",
            wanted="another --score, or --method structprune",
        )
    return score


def _check_disk(run: RunDirectory, plan: PrunePlan) -> None:
    parent = next(p for p in run.output.parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < plan.disk_bytes:
        raise InputError(
            "not enough free disk for the output",
            where=str(parent),
            got=format_bytes(free),
            wanted=f"at least {format_budget(plan.disk_bytes)}",
            do="free some, or choose another -o",
        )


def _windows(
    directory: Path, recipe: Recipe, plan: PrunePlan, device: torch.device, dtype: torch.dtype, observer: Observer
) -> tuple[str, CalibrationWindows]:
    """The calibration windows; the tokenizer is gone when this returns."""
    encoder = TextEncoder(directory)

    def sample(num_windows: int, seq_len: int, seed: int) -> Tensor:
        return sample_windows(
            directory,
            num_windows,
            seq_len,
            seed,
            start_id=encoder.bos_id,
            dtype=dtype,
            device=device,
            budget_bytes=plan.budget_bytes,
        )

    context = SourceContext(
        encode=encoder.encode,
        sample=sample,
        num_samples=recipe.num_samples,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
    )
    return load_windows(recipe.calibration, context, observer.note)


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    seq_len: int = 2048,
    max_windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> PerplexityResult:
    """Perplexity of `model`, loaded by stock transformers, on the text file `text`. Raises StructPruneError."""
    recipe = Recipe.build(device=device, dtype=dtype, seq_len=seq_len)
    content = read_text(Path(text))
    target = resolve_device(recipe.device)
    directory = resolve_model(str(model))
    # Headers first: a damaged checkpoint gets a clear error instead of the stock loader's.
    CheckpointReader(directory)
    loaded = load_model(directory, target, resolve_dtype(recipe, target))
    return perplexity(loaded, TextEncoder(directory), content, str(text), seq_len=seq_len, max_windows=max_windows)


def inspect(model: str | Path) -> ModelLayout:
    """The blocks of `model`, what can be removed from them, and their sizes; reads headers only."""
    return StockModel(CheckpointReader(resolve_model(str(model)))).layout


def default_multiple(groups: tuple[UnitGroup, ...]) -> int:
    """32 for widths below 4096, else 128: rows that the kernels of CPUs and GPUs like."""
    return 32 if max(group.num_units * group.width for group in groups) < _NARROW else 128


def _groups_in_scope(method: Method, recipe: Recipe, stock: StockModel) -> tuple[UnitGroup, ...]:
    """In the order of the forward pass."""
    kinds = UNIT_KINDS if recipe.scope == "all" else (recipe.scope,)
    groups = {group.kind: group for group in stock.groups}
    for kind in kinds:
        if kind not in method.kinds:
            raise UnsupportedError(
                f"method {method.name!r} does not prune {kind}",
                got=f"--scope {recipe.scope}",
                wanted=f"--scope {method.kinds[0]}",
            )
        if not groups[kind].config_fields:
            raise UnsupportedError(
                f"stock {stock.family.name} cannot express fewer {kind} units",
                got=f"--scope {recipe.scope}",
                wanted="--scope mlp",
            )
    return tuple(groups[kind] for kind in kinds)
