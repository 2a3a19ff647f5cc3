"""The library's entry points: check everything, then work."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from structprune.engine.depth import depth_request, depth_settings, execute_depth
from structprune.engine.device import resolve_device, resolve_dtype
from structprune.engine.executor import execute
from structprune.engine.job import Job
from structprune.engine.observer import Observer, SilentObserver
from structprune.engine.planner import PlanRequest, PrunePlan, make_plan
from structprune.errors import InputError, UnsupportedError
from structprune.evaluation.perplexity import PerplexityResult, make_reference, perplexity, text_windows
from structprune.memory import PeakMeter, format_budget, format_bytes, keep_large_blocks_apart
from structprune.methods import METHODS
from structprune.methods.method import Method
from structprune.recipe import Recipe
from structprune.report.schema import PruneReport
from structprune.runs.directory import RunDirectory
from structprune.scores import SCORES, SELECTORS, TAYLOR
from structprune.solvers import ITERATIVE
from structprune.types import UNIT_KINDS, ModelLayout, UnitGroup

_PROBE_TOKENS = 2048
_NARROW = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
    """A model and a recipe that go together; no weight has been read."""

    directory: Path
    reader: CheckpointReader
    stock: StockModel
    method: Method
    groups: tuple[UnitGroup, ...]
    """Those in scope."""
    recipe: Recipe
    """Resolved but for what the calibration text and the memory decide."""
    device: torch.device
    dtype: torch.dtype


def check(model: str | Path, recipe: Recipe) -> CheckedRun:
    """Everything that can be checked from headers and settings. Raises a subclass of StructPruneError."""
    method = METHODS.get(recipe.method)
    device = resolve_device(recipe.device)
    directory = resolve_model(str(model))
    reader = CheckpointReader(directory)
    stock = StockModel(reader, recipe.head_units if recipe.scope != "mlp" else "kv-group")
    if method.walk == "depth":
        recipe = depth_settings(recipe, method, stock)
        groups = stock.groups
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
    return CheckedRun(
        directory=directory,
        reader=reader,
        stock=stock,
        method=method,
        groups=groups,
        recipe=recipe,
        device=device,
        dtype=dtype,
    )


def prune(
    model: str | Path,
    recipe: Recipe,
    output: str | Path,
    observer: Observer | None = None,
    shared: Path | None = None,
) -> PruneReport:
    """Prune `model` (directory, hub id, .gguf file or `smollm2`) by `recipe` into the new directory `output`.

    In the directory `shared` the dense model's measurements are left for runs that ask for the same ones.

    Every input is checked before the first weight is read. Raises a subclass of StructPruneError that says what to
    do; nothing half-written stays behind.
    """
    started = time.perf_counter()
    observer = observer or SilentObserver()
    METHODS.get(recipe.method)
    run = RunDirectory(Path(output))
    run.check()
    checked = check(model, recipe)
    recipe, reader, stock, groups = checked.recipe, checked.reader, checked.stock, checked.groups
    num_probe = max(1, _PROBE_TOKENS // recipe.seq_len)

    def plan_for(num_windows: int) -> PrunePlan:
        request = PlanRequest(
            layout=stock.layout,
            groups=groups,
            stored_bytes={name: reader.num_bytes([name]) for name in reader.shapes},
            compute_dtype=checked.dtype,
            num_windows=num_windows,
            seq_len=recipe.seq_len,
            num_probe=min(num_probe, num_windows),
            needs_statistics=checked.method.needs_statistics,
            needs_survey=checked.method.survey == "loss",
            needs_weight_gradients=checked.method.survey == "taylor",
            follows_dense=recipe.target == "dense-path",
            holds_out=recipe.damping == "auto",
            iterates=recipe.solver in ITERATIVE,
            sensitivity_windows=min(recipe.sensitivity_samples, num_windows),
        )
        return make_plan(depth_request(request, recipe) if checked.method.walk == "depth" else request, recipe.memory)

    keep_large_blocks_apart()
    with PeakMeter() as meter:
        plan = plan_for(recipe.num_samples)
        name, windows = _windows(checked, plan, observer)
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
            method=checked.method,
            kinds=tuple(group.kind for group in groups),
            plan=plan,
            calibration_name=name,
            windows=windows,
            num_probe=min(num_probe, num_windows),
            device=checked.device,
            dtype=checked.dtype,
            started=started,
            shared=shared,
        )
        with run:
            walk = execute_depth if checked.method.walk == "depth" else execute
            return walk(job, run, meter, observer)


def _resolve_method_settings(recipe: Recipe, method: Method, stock: StockModel) -> Recipe:
    """Fill what the recipe leaves to the method. Raises UnsupportedError for combinations without a meaning."""
    allocator = ALLOCATORS.check(recipe.allocator or ("uniform" if recipe.structure == "uniform" else method.allocator))
    temperature = recipe.temperature
    if temperature is None:
        temperature = method.temperature if allocator == method.allocator else 0.0
    # Nothing removed leaves nothing to correct: the dense path is the model's own.
    target = (recipe.target or method.target) if recipe.sparsity > 0 else "local"
    protect_first, protect_last = _protected_blocks(recipe, method, len(stock.layout.blocks))
    num_protected = protect_first + protect_last
    if num_protected and num_protected >= len(stock.layout.blocks):
        raise InputError(
            "every block is protected",
            got=f"--protect-first {protect_first}, --protect-last {protect_last}",
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
    if recipe.shrinkage and score not in SELECTORS and method.survey != "loss":
        raise UnsupportedError(
            f"score {score!r} does not remove units one after the other, so it counts on no correlations",
            got=f"--shrinkage {recipe.shrinkage:g}",
            wanted="--score greedy, or --method structprune",
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
    if recipe.outer_iterations and method.survey != "loss":
        raise UnsupportedError(
            f"outer iterations price removals again by greedy removal, in another unit than {method.name!r} does",
            got=f"--outer-iterations {recipe.outer_iterations}",
            wanted="--outer-iterations 0, or --method structprune",
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
            "shrinkage": recipe.shrinkage if recipe.shrinkage is not None else method.shrinkage,
            "score": score,
            "solver": solver,
            "protect_first": protect_first,
            "protect_last": protect_last,
        }
    )


def _protected_blocks(recipe: Recipe, method: Method, num_blocks: int) -> tuple[int, int]:
    """Blocks at the start and at the end that lose nothing: the recipe's numbers, else the method's.

    The method protects none where nothing is removed, or where uniform widths were asked for.
    """
    default = (0, 0)
    if recipe.sparsity > 0 and recipe.structure != "uniform":
        default = method.protected_blocks(num_blocks)
    given = (recipe.protect_first, recipe.protect_last)
    first, last = (value if value is not None else other for value, other in zip(given, default, strict=True))
    return first, last


def _check_score(score: str, method: Method) -> str:
    """`score` if `method` measures what it reads. Raises InputError for an unknown name, UnsupportedError else."""
    (SCORES | SELECTORS).check(score)
    if score in TAYLOR and method.survey != "taylor":
        raise UnsupportedError(
            f"score {score!r} needs gradients by the weights, which {method.name!r} does not measure",
            wanted="another --score, or --method llm-pruner",
        )
    if method.survey == "taylor" and score not in TAYLOR:
        raise UnsupportedError(
            f"method {method.name!r} measures gradients by the weights, which score {score!r} does not read",
            wanted=f"--score {', '.join(TAYLOR)}",
        )
    if score != method.score and not method.needs_statistics and method.survey == "none":
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


def _windows(checked: CheckedRun, plan: PrunePlan, observer: Observer) -> tuple[str, CalibrationWindows]:
    """The calibration windows; the tokenizer is gone when this returns."""
    recipe = checked.recipe
    encoder = TextEncoder(checked.directory)

    def sample(num_windows: int, seq_len: int, seed: int) -> Tensor:
        return sample_windows(
            checked.directory,
            num_windows,
            seq_len,
            seed,
            start_id=encoder.bos_id,
            dtype=checked.dtype,
            device=checked.device,
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
    against: str | Path | None = None,
    seq_len: int = 2048,
    max_windows: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> PerplexityResult:
    """Perplexity of `model`, loaded by stock transformers, on the text file `text`.

    With `against` also how far its predictions are from that model's, which must have the same vocabulary.
    Raises StructPruneError.
    """
    recipe = Recipe.build(device=device, dtype=dtype, seq_len=seq_len)
    content = read_text(Path(text))
    target = resolve_device(recipe.device)
    compute_dtype = resolve_dtype(recipe, target)
    loaded, encoder = load_with_tokenizer(model, target, compute_dtype)
    windows_NS = text_windows(loaded, encoder, content, str(text), seq_len, max_windows)
    reference = None
    if against is not None:
        other, _ = load_with_tokenizer(against, target, compute_dtype)
        if other.config.vocab_size != loaded.config.vocab_size:
            raise InputError(
                "the two models have different vocabularies",
                got=f"{loaded.config.vocab_size} and {other.config.vocab_size} tokens",
                wanted="a pruned model and the one it came from",
            )
        reference = make_reference(other, windows_NS)
    return perplexity(loaded, windows_NS, str(text), reference=reference)


def load_with_tokenizer(model: str | Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, TextEncoder]:
    """The stock model in evaluation mode and its tokenizer. Raises StructPruneError."""
    directory = resolve_model(str(model))
    # Headers first: a damaged checkpoint gets a clear error instead of the stock loader's.
    CheckpointReader(directory)
    return load_model(directory, device, dtype), TextEncoder(directory)


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
