"""The units that stay, learned through the whole model, around the widths that an allocator chose.

The sensitivity pass has said what each removal costs. Around the threshold that follows from it, gates learn on the
calibration windows which units are missed least together. The last windows of every text are not learned from: a
choice counts only if it is nearer to the dense model on those of every text than the choice at the start, both with
the same stand-ins for what is gone. Then the pruning pass cuts the units and solves the consumers, as it always does.

Shape suffixes: U units of all sublayers in scope.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from structprune.allocation import ALLOCATORS
from structprune.allocation.gates import GATES, NO_GATES, GateProblem, gates_of
from structprune.allocation.gates.gate import gate_problem
from structprune.engine.planning.widths import priced_sublayers
from structprune.engine.run.context import Chosen, RunContext
from structprune.kinds import Structure
from structprune.memory import release_free_memory
from structprune.methods.method import SensitivityKind
from structprune.phases import Phase
from structprune.recipe import Recipe
from structprune.recipe.training import RecoverySettings
from structprune.recipe.units import ResolvedUnits, UnitsRecipe
from structprune.results.gates import GatedSublayer, GatesReport
from structprune.results.recovery import Evaluation
from structprune.results.texts import TextDistance
from structprune.training.calibrated import on_calibration
from structprune.training.context import RecoveryContext, Workplace
from structprune.training.gates.start import Start, measure_start
from structprune.training.gates.student import GatedStudent, place
from structprune.training.loop import History, distil
from structprune.training.snapshots import going_on

_STEP = "gates"
_LOSS_NAMES = {"divergence": "KL", "text": "loss"}
_KEEP = "keep"


def learner_of(recipe: Recipe) -> str | None:
    """Name the learner that a recipe asks for; None where it asks for none, or its pipeline has none."""
    asked = recipe.gates if isinstance(recipe, UnitsRecipe) else NO_GATES
    return None if gates_of(asked) is None else asked


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learned:
    """What is left of the steps."""

    history: History
    keep_U: Tensor
    """The best choice of those that were measured, or the last one where the start is the best; in order of removal."""

    @property
    def measured(self) -> Evaluation:
        """What the windows that only measure say of it."""
        best = self.history.best
        return best if best.step else self.history.evaluations[-1]


def choose_units(
    context: RunContext,
    costs: Mapping[str, list[Tensor]],
    widths: Mapping[str, list[int]],
    sensitivities: Path,
) -> Chosen:
    """Learn which units stay, or go on with what an interrupted process left of it.

    Raises NumericalError for gradients that are not finite.
    """
    folder = context.run.staging / "gates"
    folder.mkdir(exist_ok=True)
    problem = _problem(context, costs, widths)
    journal, path = context.run.journal, folder / "choice.safetensors"
    line = journal.find(_STEP)
    if line is None:
        learned, start, report = _learn(context, problem, folder, sensitivities)
        orders = {f"{b.kind}.{b.block}": start.order_U(b.block, b.kind).contiguous() for b in problem.budgets}
        save_file({_KEEP: learned.keep_U, **orders}, path)
        line = journal.record(_STEP, [path], report=report.model_dump(mode="json"))
    report = GatesReport(**line["report"])
    # With the numbers, whichever way it went.
    context.observer.note(f"gates ({report.learner}): {report.outcome}; KL on held-out windows: {report.text_figures}")
    if not report.accepted:
        return Chosen(widths={kind: list(counts) for kind, counts in widths.items()}, units=(), report=report)
    return _chosen(context, problem, load_file(path), widths, report)


def _problem(context: RunContext, costs: Mapping[str, list[Tensor]], widths: Mapping[str, list[int]]) -> GateProblem:
    recipe = context.settings(ResolvedUnits)
    budgets, options = priced_sublayers(context.stock, recipe, context.kinds, costs)
    # Widths that something else than one threshold decided stay as they are.
    compares_losses = SensitivityKind(ALLOCATORS.get(recipe.allocator).compares) is SensitivityKind.LOSS
    decided = not compares_losses or bool(options.further) or recipe.searches
    return gate_problem(
        budgets,
        options,
        [widths[budget.kind][budget.block] for budget in budgets],
        keeps_widths=decided or recipe.structure is Structure.UNIFORM or GATES.get(recipe.gates).keeps_widths,
        num_steps=recipe.gates_steps,
        seed=recipe.seed,
    )


def _learn(
    context: RunContext, problem: GateProblem, folder: Path, sensitivities: Path
) -> tuple[_Learned, Start, GatesReport]:
    """Measure the start, let the gates learn, and say what came of it."""
    started = time.perf_counter()
    recipe = context.settings(ResolvedUnits)
    settings = RecoverySettings(
        mode="scales", seq_len=context.windows.ids_NS.shape[1], batch=1, learning_rate=1.0, seed=recipe.seed
    )
    recovery = on_calibration(context, context.stock, settings, context.windows)
    start_folder = folder / "start"
    start_folder.mkdir(exist_ok=True)
    start = measure_start(context, start_folder, recovery.texts.all_train, problem, sensitivities)
    place_ = Workplace(folder=folder / "state", scratch=folder / "scratch")
    place_.folder.mkdir(exist_ok=True)
    learned = going_on(
        partial(_distilled, context, recovery, place_, start, problem),
        place_.folder,
        place_.scratch,
        lambda error: context.observer.note(f"{error}; the gates begin anew"),
    )
    shutil.rmtree(place_.scratch)
    release_free_memory()
    return learned, start, _report(context, recovery, problem, learned, time.perf_counter() - started)


def _distilled(
    context: RunContext, recovery: RecoveryContext, place: Workplace, start: Start, problem: GateProblem
) -> _Learned:
    recipe = context.settings(ResolvedUnits)
    with context.meter.phase(Phase.GATES):
        gates = GATES.get(recipe.gates)
        student = GatedStudent(recovery, place.scratch, context.kinds, start, problem, gates, recipe.gates_loss)
        with contextlib.closing(student):
            history = distil(
                recovery, student, place, "gates", steps=recipe.gates_steps, loss_name=_LOSS_NAMES[recipe.gates_loss]
            )
            keep_U = student.choice()
    release_free_memory()
    return _Learned(history=history, keep_U=keep_U)


def _report(
    context: RunContext, recovery: RecoveryContext, problem: GateProblem, learned: _Learned, seconds: float
) -> GatesReport:
    before, after = learned.history.evaluations[0].by_text, learned.measured.by_text
    texts = [
        TextDistance(name=name, num_windows=len(windows), before=old, after=new)
        for name, windows, old, new in zip(
            _names(context, recovery), recovery.texts.held_out, before, after, strict=True
        )
    ]
    start_U, keep_U = problem.stays_U, learned.keep_U
    parts = zip(
        problem.budgets, *(problem.parts(value_U) for value_U in (problem.free_U, start_U, keep_U)), strict=True
    )
    return GatesReport(
        learner=context.settings(ResolvedUnits).gates,
        steps=learned.history.step,
        num_windows=len(recovery.texts.all_train),
        losses=[step.loss for step in learned.history.trace],
        texts=texts,
        sublayers=[
            GatedSublayer(
                block=budget.block,
                kind=budget.kind,
                num_free=int(free.sum()),
                kept_before=int(old.sum()),
                kept_after=int(new.sum()),
                came=int((new & ~old).sum()),
            )
            for budget, free, old, new in parts
        ],
        accepted=all(text.after < text.before for text in texts),
        seconds=seconds,
    )


def _names(context: RunContext, recovery: RecoveryContext) -> list[str]:
    """Name the texts that have windows which only measure."""
    return [
        next((text.name for text in context.windows.texts if windows[0] in text.windows), context.calibration_name)
        for windows in recovery.texts.held_out
    ]


def _chosen(
    context: RunContext,
    problem: GateProblem,
    stored: Mapping[str, Tensor],
    widths: Mapping[str, list[int]],
    report: GatesReport,
) -> Chosen:
    """Turn a choice in order of removal into unit numbers and widths."""
    kept: dict[str, list[int]] = {kind: list(counts) for kind, counts in widths.items()}
    units: list[dict[str, list[int]]] = [{} for _ in context.stock.layout.blocks]
    for budget, keep_U in zip(problem.budgets, problem.parts(stored[_KEEP].bool()), strict=True):
        order_U = stored[f"{budget.kind}.{budget.block}"]
        chosen = order_U[keep_U].sort().values.tolist()
        block, kind = place(budget)
        kept[kind][block] = len(chosen)
        for group in context.stock.layout.blocks[block].groups_of(kind):
            units[block][group.name] = chosen
    return Chosen(widths=kept, units=units, report=report)
