"""What is checked, planned and drawn for a run before its first pass: nothing here is pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from structprune.allocation.gates import gates_of
from structprune.architectures.sources.fewer_tokens import missing_tokens, source_tokenizer_bytes
from structprune.architectures.sources.resolve import open_model
from structprune.architectures.sources.tokenizer import tokenizer_bytes
from structprune.architectures.stock.forward_bytes import mixer_memory
from structprune.architectures.stock.loading import check_settings
from structprune.architectures.stock.model import StockModel
from structprune.architectures.stock.wrapper import is_wrapper_type
from structprune.calibration.context import CalibrationWindows, WindowRequest
from structprune.calibration.select import check_texts, load_texts
from structprune.calibration.sources.parts import held_bytes
from structprune.checkpoint.folder import check_needed, sort_files
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.pipelines.registry import PIPELINES
from structprune.engine.planning.forecast import Forecast
from structprune.engine.planning.host import make_plan
from structprune.engine.planning.pieces import Piece
from structprune.engine.planning.plan import PlanRequest, PrunePlan
from structprune.engine.run.calibration import source_context
from structprune.engine.run.device import DTYPES, device_budget, host_budget, resolve_device, resolve_dtype
from structprune.engine.run.pace import expected, in_words, measured_pace
from structprune.errors import InputError, UnsupportedError
from structprune.files import check_path
from structprune.kinds import SCOPES, HeadUnits
from structprune.methods import METHODS
from structprune.methods.method import Method
from structprune.ranks import ALONE, Ranks
from structprune.recipe import DEFAULT_TIME_BUDGET_S, Recipe, ResolvedRecipe, default_held_out
from structprune.recipe.limits import targets_of
from structprune.recipe.repaired import (
    RepairedRecipe,
    merges_rows,
    objective_of,
    repair_adds_biases,
    repair_epochs,
    repair_of,
    repair_windows,
)
from structprune.recipe.units import ResolvedUnits, UnitsRecipe
from structprune.results.summary import LEAST_TOKENS, TOKENS_PER_UNIT
from structprune.types import UnitGroup, UnitKind

_PROBE_TOKENS = 2048
# Where windows decide nothing: enough for the perplexities, of which an eighth is held out.
_SHOWN_WINDOWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun:
    """A model and a recipe that go together; no weight has been read."""

    stock: StockModel
    method: Method
    groups: tuple[UnitGroup, ...]
    """Groups of units in scope."""
    recipe: ResolvedRecipe
    """Budgets are those of this moment, and the calibration text may have fewer windows than it says."""
    device: torch.device
    dtype: torch.dtype
    kinds: tuple[UnitKind, ...]
    """Kinds of the units in scope, in the order of the forward pass."""
    forecast: Forecast
    pace: Mapping[Piece, float] | None = None
    """Seconds that each kind of work takes on this machine, where that was measured."""
    notes: tuple[str, ...] = ()
    """What was decided that a person should know, a sentence each."""
    ranks: Ranks = ALONE


def check(model: str | Path, recipe: Recipe, ranks: Ranks = ALONE) -> ResolvedRun:
    """Check everything that headers and settings tell. Raises a subclass of StructPruneError."""
    for text in recipe.texts:
        check_path(text.name, "the text file")
    check_texts(recipe.texts)
    if recipe.num_samples is not None and recipe.time_budget:
        raise InputError(
            "--num-samples and --time-budget would decide the same thing",
            got=f"--num-samples {recipe.num_samples}, --time-budget {recipe.time_budget}s",
            wanted="one of them",
        )
    if recipe.most_samples < len(recipe.texts):
        raise InputError(
            "there are fewer calibration windows than texts",
            got=f"--num-samples {recipe.most_samples}, {len(recipe.texts)} texts",
            wanted=f"at least {len(recipe.texts)}",
        )
    method = METHODS.get(recipe.method).in_pipeline(recipe.pipeline)
    device = resolve_device(recipe.device)
    device_budget(device, recipe.device_memory or None)
    opened: list[StockModel] = []

    def open_source() -> None:
        reader = open_model(str(model), DTYPES.get(recipe.output_dtype), recipe.merge_adapter, recipe.tokens)
        stock = StockModel(reader, _head_units(recipe, method, reader))
        if stock.sliced:
            raise UnsupportedError(
                "the source is a sliced model with shortcut matrices, which no method can prune",
                where=str(reader.directory),
                do="prune the dense model, or a model sliced with --structure uniform",
            )
        check_needed(reader.directory, sort_files(reader.directory, stock.reader.weight_files))
        check_settings(reader.directory)
        opened.append(stock)

    # Downloaded once where the ranks share a cache; and what is wrong with it is said once.
    ranks.broadcast(open_source)
    if not ranks.is_first:
        open_source()
    stock = opened[0]
    ranks.check_equal({"source checkpoint": stock.reader.fingerprint(), "kind of device": device.type})
    # Measured where it is not said, so the ranks might find different ones.
    dtype = ranks.broadcast(lambda: resolve_dtype(recipe, device))
    asked = recipe.model_copy(
        update={
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "seq_len": min(recipe.seq_len, stock.layout.max_positions),
            "memory": host_budget(recipe.memory),
            "device_memory": device_budget(device, recipe.device_memory or None),
        }
    )

    def with_windows(num_samples: int) -> ResolvedRun:
        """Resolve what depends on how many calibration windows there are."""
        settings = _counted(asked, num_samples)
        pipeline = PIPELINES.get(method.pipeline)
        resolved, groups = ranks.broadcast(lambda: pipeline.resolve(settings, method, stock))
        _check_objective(resolved, method)
        kinds: tuple[UnitKind, ...] = tuple(dict.fromkeys(group.kind for group in groups))
        forecast = ranks.broadcast(lambda: pipeline.forecast(stock, resolved, kinds))
        if repair_adds_biases(resolved):
            # Whether they stay is known when the repair is done.
            forecast = replace(forecast, tensors=None)
        return ResolvedRun(
            stock=stock,
            method=method,
            groups=groups,
            recipe=resolved,
            device=device,
            dtype=dtype,
            kinds=kinds,
            forecast=forecast,
            ranks=ranks,
        )

    found = with_windows(recipe.most_samples)
    if recipe.num_samples is not None:
        return found
    decides = PIPELINES.get(method.pipeline).needs_windows(found.recipe, method)
    if not decides and repair_of(found.recipe) is None:
        found = with_windows(min(recipe.most_samples, max(_SHOWN_WINDOWS, len(recipe.texts))))
    budget_s = DEFAULT_TIME_BUDGET_S if recipe.time_budget is None else recipe.time_budget
    return _within(budget_s, found, with_windows)


def _counted(asked: Recipe, num_samples: int) -> Recipe:
    """Say how many windows there are, and what follows from that."""
    held_out = default_held_out(num_samples, asked.seq_len) if asked.held_out is None else asked.held_out
    decided = {"num_samples": num_samples, "time_budget": 0, "held_out": held_out}
    if isinstance(asked, RepairedRecipe):
        decided["repair_samples"] = repair_windows(asked, num_samples)
        if decided["repair_samples"] == 1:
            raise InputError(
                "one window cannot both teach the repair and measure it",
                got=f"--repair {asked.repair}, 1 window",
                wanted="at least 2 for --num-samples and --repair-samples",
            )
    return asked.model_copy(update=decided)


def _check_objective(recipe: ResolvedRecipe, method: Method) -> None:
    """Raise UnsupportedError for an objective where nothing is chosen by it."""
    chooses = recipe.chooses_ridge and method.needs_statistics
    if objective_of(recipe).by_text and not chooses and repair_of(recipe) is None:
        raise UnsupportedError(
            "nothing is chosen on windows kept apart, so there is no worst text to choose by",
            got=f"--method {method.name}, --objective worst",
            wanted="--damping auto where the method solves weights again, or --repair scales",
        )


def _within(budget_s: int, most: ResolvedRun, with_windows: Callable[[int], ResolvedRun]) -> ResolvedRun:
    """Take as many windows as the run has time for here: at most those of `most`, and enough to fit its weights.

    The work grows with the number of windows by as much for each. Where it cannot be counted it is not limited.
    """
    seq_len, num_most = most.recipe.seq_len, most.recipe.num_samples
    plans = {num_most: plan_run(most, num_most)}
    if plans[num_most].work is None:
        return most
    widest = max((group.num_units for group in most.groups), default=0)
    fewest = -(-max(LEAST_TOKENS, TOKENS_PER_UNIT * widest) // seq_len)
    fewest = min(num_most, max(fewest, len(most.recipe.texts), 2))
    plans[fewest] = plan_run(with_windows(fewest), fewest)

    def choose() -> tuple[Mapping[Piece, float], int, float]:
        """Return the pace, the number of windows, and seconds that are over the budget if theirs are."""
        pace = measured_pace(most.stock, most.recipe, plans[num_most].work or {}, most.device, most.dtype)
        slow, quick = (expected(plans[count].work or {}, pace).seconds for count in (num_most, fewest))
        if slow <= budget_s:
            return pace, num_most, slow
        if quick > budget_s:
            return pace, fewest, quick
        return pace, fewest + int((budget_s - quick) / (slow - quick) * (num_most - fewest)), budget_s

    pace, count, seconds = most.ranks.broadcast(choose)
    if count == num_most and seconds <= budget_s:
        return replace(most, pace=pace)
    note = f"{count} calibration windows of {seq_len} tokens: what this machine does in {in_words(budget_s)}"
    if seconds > budget_s:
        note = (
            f"{count} calibration windows of {seq_len} tokens, which take {in_words(seconds)} on this machine "
            f"instead of {in_words(budget_s)}: fewer would be too few for up to {widest} units of a block"
        )
    found = most if count == num_most else with_windows(count)
    return replace(found, pace=pace, notes=(f"{note} (--num-samples or --time-budget say otherwise)",))


def _head_units(recipe: Recipe, method: Method, reader: CheckpointReader) -> HeadUnits:
    """Decide what attention is counted in; without attention in scope there is no choice.

    Value channels need a modelling file, which a text model inside another one cannot have.
    """
    asked = recipe.head_units if isinstance(recipe, UnitsRecipe) else None
    # Only whole KV heads take keys and values of the cache with them.
    default = "kv-group" if "target_kv_cache" in targets_of(recipe) else method.head_units
    if default == "value-channel" and is_wrapper_type(reader.config.get("model_type")):
        default = "kv-group"
    return asked or default if "attention" in SCOPES[recipe.scope] else "kv-group"


def num_probe(recipe: Recipe) -> int:
    """Count the calibration windows whose perplexity is reported."""
    return max(1, _PROBE_TOKENS // recipe.seq_len)


def plan_run(resolved: ResolvedRun, num_windows: int) -> PrunePlan:
    """Plan how a run with so many calibration windows goes about it. Raises MemoryBudgetError."""
    recipe, stock, num_ranks = resolved.recipe, resolved.stock, resolved.ranks.size
    tokens = (num_windows + recipe.held_out + repair_windows(recipe, num_windows)) * recipe.seq_len
    files = [held_bytes(text.path, tokens) for text in recipe.texts if text.path is not None]
    request = PlanRequest(
        layout=stock.layout,
        groups=resolved.groups,
        num_stages=stock.num_stages,
        mixers=mixer_memory(stock, recipe.seq_len, resolved.dtype),
        stored_bytes={name: stock.reader.num_bytes([name]) for name in stock.reader.shapes},
        stored_dtypes=stock.reader.dtypes,
        compute_dtype=resolved.dtype,
        num_windows=-(-num_windows // num_ranks),
        seq_len=recipe.seq_len,
        num_probe=min(num_probe(recipe), num_windows),
        needs_statistics=resolved.method.needs_statistics,
        score="",
        solves=False,
        held_out_windows=-(-recipe.held_out // num_ranks),
        kept={kind: max(counts) for kind, counts in (resolved.forecast.kept or {}).items()},
        tokenizer_bytes=tokenizer_bytes(stock.reader.directory),
        text_bytes=max(files, default=0),
        packaged_text=len(files) < len(recipe.texts),
        num_texts=len(recipe.texts),
        missing_tokens=missing_tokens(stock.reader) if merges_rows(recipe) else 0,
        source_tokenizer_bytes=source_tokenizer_bytes(stock.reader) if merges_rows(recipe) else 0,
        repair_windows=repair_windows(recipe, num_windows),
        repair_epochs=repair_epochs(recipe),
        repair_adds_biases=repair_adds_biases(recipe),
        sensitivity_windows=-(-min(recipe.backward_samples, num_windows) // num_ranks),
        reload_check=recipe.reload_check,
        num_ranks=num_ranks,
        held_bytes=stock.reader.scratch_bytes,
    )
    request = PIPELINES.get(resolved.method.pipeline).request(request, recipe, resolved.method, stock)
    return make_plan(request, recipe.memory, recipe.device_memory or None)


def check_planned(model: str | Path, recipe: Recipe) -> ResolvedRun:
    """Check what `check` does, and that the run fits into its memory. Raises a subclass of StructPruneError."""
    resolved = check(model, recipe)
    plan_run(resolved, resolved.recipe.num_samples)
    return resolved


def _divisions(recipe: ResolvedRecipe, method: Method) -> list[tuple[str, str]]:
    """List what needs some windows to fit and others to judge by: what it does with them, and its setting."""
    found: list[tuple[str, str]] = []
    if recipe.chooses_ridge and method.needs_statistics:
        found.append(("fit and choose the ridge", "--damping auto"))
    if repair_of(recipe) is not None:
        found.append(("teach the repair and measure it", f"--repair {repair_of(recipe)}"))
    if merges_rows(recipe):
        found.append(("fit rows and measure them", "--merge-rows"))
    if isinstance(recipe, ResolvedUnits) and gates_of(recipe.gates) is not None:
        found.append(("teach the gates and measure them", f"--gates {recipe.gates}"))
    return found


def drawn_windows(
    resolved: ResolvedRun, plan: PrunePlan, notify: Callable[[str], None]
) -> tuple[str, CalibrationWindows]:
    """Load the calibration windows and the name of their source; the tokenizer is freed when this returns.

    Raises InputError for a text with too few windows.
    """
    recipe = resolved.recipe
    divisions = _divisions(recipe, resolved.method)
    num_needed = 2 if divisions else 1
    source = source_context(
        resolved.stock,
        WindowRequest(
            num_samples=recipe.num_samples,
            seq_len=recipe.seq_len,
            seed=recipe.seed,
            bos=recipe.bos,
            num_held_out=recipe.held_out,
            num_repair=(num_repair := repair_windows(recipe, recipe.num_samples)),
            min_samples=num_needed,
        ),
        dtype=resolved.dtype,
        device=resolved.device,
        # A text that the model samples itself takes all of it, which passes the host on its way to a device.
        budget_bytes=min(size for size in (plan.budgets.host, plan.budgets.device) if size is not None),
    )
    name, windows = load_texts(recipe.texts, source, notify)
    if (found := len(windows.ids_NS)) < num_needed:
        what, flag = divisions[0]
        ridge_only = len(divisions) == 1 and recipe.chooses_ridge
        raise InputError(
            f"one window cannot both {what}",
            where=name,
            got=f"{found} window of {recipe.seq_len} tokens, {flag}",
            wanted=f"at least {num_needed} windows" + (", or a number for --damping" if ridge_only else ""),
            do="give more text, or lower --seq-len",
        )
    if windows.num_repair < num_repair:
        notify(
            f"{name} has {windows.num_repair} windows for the repair beside those that are fitted on, not "
            f"{num_repair}: it learns from some of those too, which show little of what it could mend"
        )
    if windows.held_out_NS is not None and source.decode is not None:
        written = [source.decode(ids_S[1:]) for ids_S in windows.held_out_NS]
        windows = replace(windows, held_out_bytes=sum(len(text.encode()) for text in written))
    return name, windows
