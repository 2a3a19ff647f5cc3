"""The library's entry points: check everything, then work."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from structprune.architectures.loading import load_model
from structprune.architectures.source import gguf_file, resolve_model
from structprune.architectures.stock import StockModel
from structprune.architectures.tokenizer import TextEncoder
from structprune.calibration.context import CalibrationWindows
from structprune.calibration.select import load_windows
from structprune.calibration.sources.file import read_text
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.device import resolve_device, resolve_dtype
from structprune.engine.finish import REPORT_NAME
from structprune.engine.foresight import Foresight, shape_of
from structprune.engine.job import Job
from structprune.engine.observer import Observer, SilentObserver
from structprune.engine.planner import PlanRequest, PrunePlan, make_plan
from structprune.engine.text import source_context
from structprune.engine.walks import WALKS
from structprune.errors import InputError, UnsupportedError
from structprune.evaluation.perplexity import PerplexityResult, make_reference, perplexity, text_windows
from structprune.exporters import EXPORTERS
from structprune.exporters.export import EXPORT_DTYPES, ExportRequest, ExportResult
from structprune.exporters.push import push as push_directory
from structprune.exporters.runtimes import RuntimeSupport, runtimes
from structprune.files import expand_user
from structprune.memory import PeakMeter, bound_hidden_memory
from structprune.methods import METHODS
from structprune.methods.method import Method
from structprune.recipe import Recipe
from structprune.recovery.run import recover_model
from structprune.recovery.settings import RecoverySettings
from structprune.report.recovery import RecoveryReport
from structprune.report.schema import PruneReport
from structprune.runs.directory import RunDirectory, check_absent, check_free_disk
from structprune.solvers import NUM_LATENTS
from structprune.types import ModelLayout, UnitGroup, UnitKind

_PROBE_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRun:
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
    foresight: Foresight


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run would do, from headers and settings alone."""

    source: str
    recipe: Recipe
    """Resolved but for what the calibration text decides."""
    layout: ModelLayout
    plan: PrunePlan
    foresight: Foresight
    runtimes: list[RuntimeSupport]
    """Who will load the result."""


def check(model: str | Path, recipe: Recipe) -> CheckedRun:
    """Everything that can be checked from headers and settings. Raises a subclass of StructPruneError."""
    method = METHODS.get(recipe.method)
    device = resolve_device(recipe.device)
    directory = resolve_model(str(model))
    stock = StockModel(CheckpointReader(directory), recipe.head_units if recipe.scope != "mlp" else "kv-group")
    if stock.sliced:
        raise UnsupportedError(
            "the source is a sliced model with shortcut matrices, which no method can prune",
            where=str(directory),
            do="prune the dense model, or a model sliced with --structure uniform",
        )
    dtype = resolve_dtype(recipe, device)
    recipe = recipe.model_copy(
        update={
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "seq_len": min(recipe.seq_len, stock.layout.max_positions),
        }
    )
    recipe, groups = WALKS[method.walk].resolve(recipe, method, stock)
    kinds: tuple[UnitKind, ...] = tuple(dict.fromkeys(group.kind for group in groups))
    return CheckedRun(
        directory=directory,
        stock=stock,
        method=method,
        groups=groups,
        recipe=recipe,
        device=device,
        dtype=dtype,
        kinds=kinds,
        foresight=WALKS[method.walk].foresee(stock, recipe, kinds),
    )


def plan(model: str | Path, recipe: Recipe) -> RunPlan:
    """What `prune` would do: its memory and disk, the size of the result, and who will load it; reads headers only.

    Raises the errors that `prune` would raise before its first weight, but for those of the calibration text.
    """
    bound_hidden_memory()
    checked = check(model, recipe)
    return RunPlan(
        source=str(model),
        recipe=checked.recipe,
        layout=checked.stock.layout,
        plan=_plan(checked, checked.recipe.num_samples),
        foresight=checked.foresight,
        runtimes=runtimes(checked.foresight.shape),
    )


def _num_probe(recipe: Recipe) -> int:
    """Calibration windows whose perplexity is reported."""
    return max(1, _PROBE_TOKENS // recipe.seq_len)


def _plan(checked: CheckedRun, num_windows: int) -> PrunePlan:
    recipe, stock = checked.recipe, checked.stock
    survey = checked.method.survey_for(recipe.allocator or "uniform")
    request = PlanRequest(
        layout=stock.layout,
        groups=checked.groups,
        stored_bytes={name: stock.reader.num_bytes([name]) for name in stock.reader.shapes},
        compute_dtype=checked.dtype,
        num_windows=num_windows,
        seq_len=recipe.seq_len,
        num_probe=min(_num_probe(recipe), num_windows),
        needs_statistics=checked.method.needs_statistics or survey in ("loss", "scores"),
        needs_survey=survey == "loss",
        needs_weight_gradients=survey == "taylor",
        follows_dense=recipe.target == "dense-path",
        holds_out=recipe.damping == "auto",
        num_latents=NUM_LATENTS.get(recipe.solver or "", 0),
        sensitivity_windows=min(recipe.sensitivity_samples, num_windows),
        reload_check=recipe.reload_check,
    )
    return make_plan(WALKS[checked.method.walk].request(request, recipe, stock), recipe.memory)


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
    bound_hidden_memory()
    observer = observer or SilentObserver()
    METHODS.get(recipe.method)
    run = RunDirectory(Path(output))
    run.check()
    checked = check(model, recipe)
    recipe, stock = checked.recipe, checked.stock
    walk = WALKS[checked.method.walk]

    with PeakMeter() as meter:
        plan = _plan(checked, recipe.num_samples)
        name, windows = _windows(checked, plan, observer)
        check_free_disk(run.output, plan.disk_bytes)
        num_windows = len(windows.ids_NS)
        if num_windows < recipe.num_samples:
            plan = _plan(checked, num_windows)
        job = Job(
            source=str(model),
            stock=stock,
            recipe=recipe.model_copy(
                update={"calibration": name, "num_samples": num_windows, "memory": plan.budget_bytes}
            ),
            method=checked.method,
            kinds=checked.kinds,
            plan=plan,
            calibration_name=name,
            windows=windows,
            num_probe=min(_num_probe(recipe), num_windows),
            device=checked.device,
            dtype=checked.dtype,
            started=started,
            shared=shared,
        )
        with run:
            return walk.execute(job, run, meter, observer)


def _windows(checked: CheckedRun, plan: PrunePlan, observer: Observer) -> tuple[str, CalibrationWindows]:
    """The calibration windows; the tokenizer is gone when this returns."""
    recipe = checked.recipe
    context = source_context(
        checked.directory,
        num_samples=recipe.num_samples,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        dtype=checked.dtype,
        device=checked.device,
        budget_bytes=plan.budget_bytes,
    )
    return load_windows(recipe.calibration, context, observer.note)


def recover(
    student: str | Path,
    teacher: str | Path,
    settings: RecoverySettings,
    output: str | Path,
    observer: Observer | None = None,
) -> RecoveryReport:
    """Let `student`, a pruned model, learn again from the dense `teacher`; the result goes to the directory `output`.

    The format stays the student's. A run that was killed or interrupted goes on when it is called again. Raises a
    subclass of StructPruneError that says what to do.
    """
    bound_hidden_memory()
    return recover_model(student, teacher, settings, output, observer or SilentObserver())


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
    return inspect_with_runtimes(model)[0]


def inspect_with_runtimes(model: str | Path) -> tuple[ModelLayout, list[RuntimeSupport]]:
    """What `inspect` says, and the runtimes that load `model` as it is, as far as known."""
    stock = StockModel(CheckpointReader(resolve_model(str(model))))
    return stock.layout, runtimes(shape_of(stock, Recipe(), stock.layout.config))


def export(
    model: str | Path,
    output: str | Path,
    *,
    format: str = "gguf",
    dtype: str = "stored",
    tokenizer_gguf: str | Path | None = None,
    observer: Observer | None = None,
) -> ExportResult:
    """Write `model` (an output of `prune`, or any model that `prune` takes) as a file for another runtime.

    The tokenizer of a model that came from a GGUF file is copied from there, as `tokenizer_gguf` would be.
    Raises a subclass of StructPruneError; the file appears whole or not at all.
    """
    observer = observer or SilentObserver()
    exporter = EXPORTERS.get(format)
    if dtype not in ("stored", *EXPORT_DTYPES):
        raise InputError("unknown --dtype", got=dtype, wanted=f"stored, {', '.join(EXPORT_DTYPES)}")
    path = expand_user(str(output))
    check_absent(path)
    directory = resolve_model(str(model))
    reader = CheckpointReader(directory)
    tokenizer = expand_user(str(tokenizer_gguf)) if tokenizer_gguf else _source_gguf(str(model), directory)
    if tokenizer is not None:
        observer.note(f"tokenizer copied from {tokenizer}")

    def start(total: int) -> None:
        observer.start("write", total)

    return exporter(
        ExportRequest(
            reader=reader,
            output=path,
            name=path.stem,
            dtype=dtype,
            tokenizer_gguf=tokenizer,
            start=start,
            advance=observer.advance,
        )
    )


def _source_gguf(model: str, directory: Path) -> Path | None:
    """The GGUF file that `model`, or the model that it was pruned from, was read from, if it is still there."""
    report = directory / REPORT_NAME
    source = model
    if report.is_file():
        source = json.loads(report.read_text(encoding="utf-8")).get("source", model)
    return gguf_file(source)


def push(
    output: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    observer: Observer | None = None,
) -> str:
    """Upload the finished output of a run to the model repository `repo_id` of the hub, as one commit.

    The token is where huggingface_hub looks for it. Returns the commit's address. Raises StructPruneError.
    """
    note = (observer or SilentObserver()).note
    directory = expand_user(str(output))
    return push_directory(directory, REPORT_NAME, repo_id, private=private, revision=revision, note=note)
