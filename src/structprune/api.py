"""The library's entry points: check everything, then work."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

from structprune.architectures.sources.adapter import NO_ADAPTER
from structprune.architectures.sources.resolve import gguf_file, open_model
from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.architectures.stock.model import StockModel
from structprune.assess import evaluate as evaluate
from structprune.assess.sizes import sized
from structprune.assess.split import as_planned, without_units
from structprune.assess.vocabulary import decided as decided_tokens
from structprune.assess.vocabulary import planned as planned_tokens
from structprune.checkpoint.weight_source import FewerTokens
from structprune.engine.pipelines.registry import PIPELINES
from structprune.engine.planning.forecast import Forecast, PlannedSize, planned_size, retyped, shape_of
from structprune.engine.planning.plan import Budgets, PrunePlan
from structprune.engine.resolve import ResolvedRun, drawn_windows, num_probe, plan_run
from structprune.engine.resolve import check as check
from structprune.engine.run.calibration import window_start
from structprune.engine.run.context import RunContext
from structprune.engine.run.device import DeviceMeter
from structprune.engine.run.finalize import load_report
from structprune.engine.run.identity import RunRequest, as_begun, begin_or_go_on, find_request
from structprune.engine.run.pace import Expected, expected, in_words, measured_pace
from structprune.engine.run.versions import versions
from structprune.errors import CheckpointError, InputError, UnsupportedError
from structprune.exporters import EXPORTERS
from structprune.exporters.export import EXPORT_DTYPES, ExportRequest, ExportResult
from structprune.exporters.push import push as push_directory
from structprune.exporters.runtimes import RuntimeSupport, runtimes
from structprune.files import check_path, expand_user, read_json
from structprune.memory import PeakMeter, bound_hidden_memory, release_free_memory
from structprune.methods import METHODS
from structprune.observer import MarkingObserver, Observer, SilentObserver
from structprune.ranks import ALONE, RANK_TIMEOUT_S, Ranks, launched, refuse_ranks
from structprune.recipe import Recipe, ResolvedRecipe
from structprune.recipe.repaired import merges_rows, repair_of
from structprune.recipe.tokens import AUTO_TOKENS
from structprune.recipe.training import RecoverySettings
from structprune.results.recovery import RecoveryReport
from structprune.results.report import PruneReport
from structprune.results.schema import REPORT_NAME
from structprune.results.summary import share_note
from structprune.runs.directory import RunDirectory, check_absent
from structprune.training import REPAIRS
from structprune.training.finalize import RECOVERY_REPORT_NAME
from structprune.training.gates.choose import choose_units, learner_of
from structprune.training.run import find_recovery, load_recovery_report, recover_model
from structprune.types import ModelLayout
from structprune.vocabulary.kept import KEPT_NAME

# An export is written beside its place first, under a longer name.
_EXPORT_SPARE = len("..tmp-4194304")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run would do, from headers and settings alone."""

    source: str
    recipe: ResolvedRecipe
    """What the run would work by if the calibration text is long enough."""
    layout: ModelLayout
    plan: PrunePlan
    forecast: Forecast
    runtimes: list[RuntimeSupport]
    """Who will load the result."""
    size: PlannedSize
    notes: tuple[str, ...]
    """What a person should know of source and result, a sentence each."""
    start: str | None
    """The start token that every window will begin with; empty: none; None: the tokenizer cannot be asked."""
    tokens: FewerTokens | None = None
    """What goes with tokens of the vocabulary, beside the parameters of `layout`; None: all stay."""
    time: Expected | None = None
    """How long the run is expected to take here; None: nobody asked, or it depends on what the run finds."""

    @property
    def parameters_before(self) -> int:
        """Parameters of the source, rows of tokens that go among them."""
        return self.layout.all_parameters + (0 if self.tokens is None else self.tokens.parameters)


def plan(model: str | Path, recipe: Recipe, *, timed: bool = False) -> RunPlan:
    """Plan a run of `prune`: its memory and disk, the size of its result, and which runtimes load that.

    With `timed` also how long it will take, for which this machine is tried for a few seconds. Reads headers only.
    Raises the errors that `prune` would raise before its first weight, but for those of the calibration text.
    """
    bound_hidden_memory()
    recipe, said = as_planned(model, recipe)
    recipe, counted = planned_tokens(model, recipe)
    recipe = without_units(model, recipe, SilentObserver())
    resolved = check(model, recipe)
    found = plan_run(resolved, resolved.recipe.num_samples)
    return RunPlan(
        source=str(model),
        recipe=resolved.recipe,
        layout=resolved.stock.layout,
        plan=found,
        time=_time(resolved, found) if timed else None,
        forecast=resolved.forecast,
        runtimes=runtimes(resolved.forecast.shape),
        size=planned_size(resolved.stock, resolved.recipe, resolved.kinds, resolved.forecast),
        start=_planned_start(resolved),
        tokens=resolved.stock.reader.fewer_tokens,
        notes=(
            *said,
            *counted,
            *resolved.notes,
            *resolved.stock.layout.notes,
            *retyped(resolved.stock.layout.config, {"model_type": resolved.forecast.shape.model_type}),
            *(() if resolved.forecast.limits else share_note(resolved.recipe, resolved.forecast.shares)),
        ),
    )


def _time(resolved: ResolvedRun, plan: PrunePlan) -> Expected | None:
    """Try this machine, if it was not tried yet; None where the work cannot be counted beforehand."""
    if plan.work is None:
        return None
    pace = resolved.pace or measured_pace(resolved.stock, resolved.recipe, plan.work, resolved.device, resolved.dtype)
    return expected(plan.work, pace)


def _planned_start(resolved: ResolvedRun) -> str | None:
    """Find what windows will begin with. Raises InputError for a start token that the tokenizer does not have."""
    stock = resolved.stock
    try:
        encoder = TextEncoder(stock.reader.directory, stock.layout.vocab_size, stock.tokenizer_config)
        return window_start(encoder, resolved.recipe.bos).text
    except CheckpointError:
        # Without a tokenizer there is still much to plan.
        return None


def prune(
    model: str | Path,
    recipe: Recipe,
    output: str | Path,
    observer: Observer | None = None,
    shared: Path | None = None,
    *,
    rank_timeout: float = RANK_TIMEOUT_S,
    timed: bool = False,
) -> PruneReport:
    """Prune `model` (directory, hub id, .gguf file or `smollm2`) by `recipe` into the new directory `output`.

    A run of the same recipe that was cut goes on where it was. In the directory `shared` the dense model's measurements
    are left for runs that ask for the same ones. With `timed` the observer is first told how long it will take.

    Every input is checked before the first weight is read. Raises a subclass of StructPruneError that says what to
    do; nothing half-written looks like a result.

    Called by every process that a launcher such as torchrun started, these share the work (docs/distributed.md); the
    first one writes and observes, all get the report. A rank that is not heard of for `rank_timeout` seconds, or that
    keeps the others waiting for as long, ends the run in all of them with RankError.
    """
    started = time.perf_counter()
    bound_hidden_memory()
    with _ranks(rank_timeout) as ranks:
        observer = observer if observer is not None and ranks.is_first else SilentObserver()
        run = RunDirectory(Path(output), observer.note, ranks)
        ranks.check_equal(
            {f"version of {name}": version for name, version in versions().items()}
            | {f"--{name.replace('_', '-')}": str(value) for name, value in recipe}
            | {"output": str(run.output)}
        )
        ranks.broadcast(lambda: _check_asked(recipe, run, ranks, shared))
        asked = ranks.broadcast(lambda: as_begun(recipe, run, observer.note))
        if asked.vocabulary == AUTO_TOKENS and ranks.size > 1:
            raise InputError(
                "sizes of the vocabulary are measured by one process",
                got=f"--vocabulary auto, {ranks.size} ranks",
                do="decide the size first: structprune vocabulary MODEL -o FILE --sizes ... --text ... --measure ...",
            )
        asked = ranks.broadcast(lambda: sized(model, asked, observer, prune))
        asked = ranks.broadcast(lambda: without_units(model, decided_tokens(model, asked, observer), observer))
        # What counting has taken is free and still this process's.
        release_free_memory()
        resolved = check(model, asked, ranks)
        for note in resolved.notes:
            observer.note(note)
        found = None
        if timed and ranks.size == 1 and not run.staging.exists():
            found = _time(resolved, plan_run(resolved, resolved.recipe.num_samples))
        if found is not None:
            observer.note(f"expected to take {in_words(found.seconds)} on this machine")
        with PeakMeter() as meter, run:
            request = RunRequest(model=str(model), asked=recipe)
            context = _context(resolved, request, run, meter, observer, started, shared)
            if ranks.broadcast(run.is_committed):
                return ranks.broadcast(lambda: _left_to_tidy(run))
            with context.device_meter:
                return PIPELINES.get(resolved.method.pipeline).execute(context)


def _ranks(timeout_s: float) -> contextlib.AbstractContextManager[Ranks]:
    """Return this process alone, or join the ranks that a launcher started. Raises InputError."""
    if not timeout_s > 0:
        raise InputError("--rank-timeout is not usable", got=timeout_s, wanted="more than 0 seconds")
    if launched()[1] == 1:
        return contextlib.nullcontext(ALONE)
    # Only now: a run of one process does without it.
    from structprune.engine.ranks.group import joined

    return joined(timeout_s)


def _check_asked(recipe: Recipe, run: RunDirectory, ranks: Ranks, shared: Path | None) -> None:
    method = METHODS.get(recipe.method).in_pipeline(recipe.pipeline)
    run.check()
    recover_after = "prune without --repair, then `structprune recover --mode scales` in one process"
    for what, flag, name, do in (
        ("a repair", "--repair", repair_of(recipe), recover_after),
        ("learning gates", "--gates", learner_of(recipe), "start it without torchrun"),
        ("merging rows", "--merge-rows", True if merges_rows(recipe) else None, "start it without torchrun"),
    ):
        if ranks.size > 1 and name is not None:
            raise UnsupportedError(f"{what} is not for several ranks", got=f"{flag} {name}, {ranks.size} ranks", do=do)
    if ranks.size > 1 and (shared is not None or not PIPELINES.get(method.pipeline).shares_windows):
        what = "a place for the measurements of other runs" if shared else f"method {method.name!r}"
        alike = [name for name in METHODS if PIPELINES.get(METHODS.get(name).pipeline).shares_windows]
        raise UnsupportedError(
            f"{what} is not for several ranks",
            got=f"{ranks.size} ranks",
            wanted="one process" if shared else f"one process, or one of {', '.join(alike)}",
            do="start it without torchrun",
        )


def _left_to_tidy(run: RunDirectory) -> PruneReport:
    """Finish a run that was interrupted when all work was done: tidy its directory and return its report."""
    run.discard()
    return load_report(run.output)


def resume(
    run: str | Path, observer: Observer | None = None, *, rank_timeout: float = RANK_TIMEOUT_S
) -> PruneReport | RecoveryReport:
    """Go on with the run whose output or working directory is `run`, or return the report if it is finished.

    A run of `prune`, on any number of ranks whatever it was begun on, or of `recover`. Raises InputError if nothing is
    left of such a run, and what these raise.
    """
    directory = RunDirectory.named(expand_user(str(run)))
    if (begun := find_recovery(directory)) is not None:
        with contextlib.chdir(begun.directory):
            return recover(begun.student, begun.teacher, begun.asked, directory.output, observer)
    start = find_request(directory)
    if start is None:
        if (directory.output / RECOVERY_REPORT_NAME).is_file():
            return load_recovery_report(directory.output)
        if (directory.output / REPORT_NAME).is_file():
            return load_report(directory.output)
        wanted = "the -o of a run that was cut after it had begun"
        raise InputError("there is no run to go on with", where=str(directory.staging), wanted=wanted)
    # Paths in the settings count from where the run was started.
    with contextlib.chdir(start.directory):
        return prune(start.model, start.asked, directory.output, observer, rank_timeout=rank_timeout)


def _context(
    resolved: ResolvedRun,
    request: RunRequest,
    run: RunDirectory,
    meter: PeakMeter,
    observer: Observer,
    started: float,
    shared: Path | None,
) -> RunContext:
    """Start the run, or continue the one in its directory. Raises InputError if another run was started there."""

    def plan(budgets: Budgets, num_windows: int) -> PrunePlan:
        update = {"memory": budgets.host, "device_memory": budgets.device or 0}
        return plan_run(replace(resolved, recipe=resolved.recipe.model_copy(update=update)), num_windows)

    begun = resolved.ranks.broadcast(
        lambda: begin_or_go_on(
            run,
            resolved.stock.reader,
            resolved.recipe,
            request,
            plan,
            lambda plan: drawn_windows(resolved, plan, observer.note),
        )
    )
    # A tokenizer of many tokens takes hundreds of megabytes, which are free and still this process's.
    release_free_memory()
    num_windows = len(begun.windows.ids_NS)
    return RunContext(
        source=request.model,
        run=run,
        observer=MarkingObserver(observer, meter),
        stock=resolved.stock,
        recipe=resolved.recipe.model_copy(
            update={
                "calibration": begun.calibration,
                "num_samples": num_windows,
                "held_out": begun.windows.num_held_out,
                "memory": begun.plan.budgets.host,
                "device_memory": begun.plan.budgets.device or 0,
            }
        ),
        method=resolved.method,
        kinds=resolved.kinds,
        plan=begun.plan,
        calibration_name=begun.name,
        windows=begun.windows,
        num_probe=min(num_probe(resolved.recipe), num_windows),
        device=resolved.device,
        dtype=resolved.dtype,
        started=started - run.journal.earlier_s,
        repair=None if (wanted := repair_of(resolved.recipe)) is None else REPAIRS.get(wanted),
        choose_units=None if learner_of(resolved.recipe) is None else choose_units,
        shared=shared,
        device_meter=DeviceMeter(device=resolved.device, plan=begun.plan.device),
        meter=meter,
        ranks=resolved.ranks,
    )


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
    refuse_ranks("recovery")
    bound_hidden_memory()
    return recover_model(student, teacher, settings, output, observer or SilentObserver())


def inspect(model: str | Path, *, merge_adapter: str = NO_ADAPTER) -> ModelLayout:
    """List the blocks of `model`, what can be removed from them, and their sizes; reads headers only.

    `merge_adapter` is the folder of a LoRA adapter that is merged into it, or `beside`.
    """
    return inspect_with_runtimes(model, merge_adapter)[0]


def inspect_with_runtimes(
    model: str | Path, merge_adapter: str = NO_ADAPTER
) -> tuple[ModelLayout, list[RuntimeSupport]]:
    """Return what `inspect` says, and the runtimes that load `model` as it is, as far as known."""
    stock = StockModel(open_model(str(model), adapter=merge_adapter))
    return stock.layout, runtimes(shape_of(stock, Recipe(), stock.layout.config))


def export(
    model: str | Path,
    output: str | Path,
    *,
    format: str = "gguf",
    dtype: str = "stored",
    tokenizer_gguf: str | Path | None = None,
    merge_adapter: str = NO_ADAPTER,
    observer: Observer | None = None,
) -> ExportResult:
    """Write `model` (an output of `prune`, or any model that it takes) for another runtime: `gguf`, `onnx` or `vllm`.

    `merge_adapter` is the folder of a LoRA adapter that is merged into it first, or `beside`.
    In a GGUF file the tokenizer of a model that came from another one is copied from there, as `tokenizer_gguf` would
    be. Raises a subclass of StructPruneError; the output appears whole or not at all.
    """
    observer = observer or SilentObserver()
    exporter = EXPORTERS.get(format)
    if dtype not in ("stored", *EXPORT_DTYPES):
        raise InputError("unknown --dtype", got=dtype, wanted=f"stored, {', '.join(EXPORT_DTYPES)}")
    path = expand_user(str(output))
    check_path(path, "the export", spare=_EXPORT_SPARE)
    check_absent(path)
    reader = open_model(str(model), adapter=merge_adapter)

    def start(total: int) -> None:
        observer.start("write", total)

    request = ExportRequest(
        reader=reader,
        output=path,
        name=path.stem,
        dtype=dtype,
        tokenizer_gguf=expand_user(str(tokenizer_gguf)) if tokenizer_gguf else None,
        source_gguf=_source_gguf(str(model), reader.directory),
        note=observer.note,
        start=start,
        advance=observer.advance,
    )
    exporter.check(format, request)
    return exporter.export(request)


def _source_gguf(model: str, directory: Path) -> Path | None:
    """Find the GGUF file that `model`, or the model that it was pruned from, was read from, if it is still there.

    With fewer tokens the tokenizer is another one than that file's.
    """
    if (directory / KEPT_NAME).is_file():
        return None
    report = directory / REPORT_NAME
    source = model
    if report.is_file():
        source = str(read_json(report).get("source", model))
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
