"""The search from the first proposal to the final judgement.

Generation after generation a proposer names choices of widths; they are measured on a few windows, the best of them on
more, and the proposer hears of it. Windows are drawn anew for every round, so that no choice wins by fitting them. At
the end the best few and the choice that the search started from are compared on windows that none of them has seen:
without a gain of two standard errors the start stays.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from structprune.allocation.menu import Budget, Choice, Slot, kept_units
from structprune.allocation.proposers import SEARCHES, Measured, Proposer, Rung, Search
from structprune.engine.planning.searching import ANCHOR_RUNG, NUM_FINALISTS, NUM_MASKS
from structprune.engine.planning.widths import Widths, check_shared_out, search_menu
from structprune.engine.run.context import RunContext
from structprune.engine.search.anchors import measure_anchors
from structprune.engine.search.fitness import Fitness, Measurement
from structprune.engine.search.judge import compared, figure, harms_none, of_each_text
from structprune.engine.search.statistics import measure_statistics
from structprune.engine.search.windows import SearchWindows, shared_out
from structprune.engine.sensitivity.cache import SensitivityPass
from structprune.engine.sensitivity.store import Costs
from structprune.errors import UnsupportedError
from structprune.recipe.repaired import objective_of
from structprune.recipe.units import ResolvedUnits
from structprune.results.search import AnchorReport, SearchGeneration, SearchReport
from structprune.results.texts import TextDistance
from structprune.runs.journal import Journal

_STEP = "search"
_ANCHORS = 1_000_003
"""Stands for the generation of what is measured in front of the first one, where windows are drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What a search ends with."""

    widths: Widths
    report: SearchReport


def search_widths(context: RunContext, found: SensitivityPass, costs: Costs, start: Widths) -> Searched:
    """Search for widths that lose less than those of `start` at the same limits, or take what was found before.

    Raises NumericalError for outputs that are not finite, UnsupportedError for a start that is none of the widths that
    may be chosen.
    """
    folder, journal = context.run.staging / "search", context.run.journal
    line = journal.find(_STEP, start)
    if line is None:
        started = time.perf_counter()
        with contextlib.closing(Journal(folder, context.observer.note)) as own:
            windows = shared_out(context.windows, context.num_backward)
            measure_statistics(context.on_windows(windows.fitted), own, found)
            fitness = Fitness(context, folder, own, windows.unfitted)
            with contextlib.closing(fitness):
                searched = _Loop(context=context, fitness=fitness, windows=windows, start=start).run(costs)
            seconds = own.earlier_s + time.perf_counter() - started
        report = searched.report.model_copy(update={"seconds": seconds})
        line = journal.record(
            _STEP,
            given=start,
            widths=searched.widths,
            report=report.model_dump(mode="json"),
            peak_bytes=context.meter.peak_so_far(),
        )
    shutil.rmtree(folder, ignore_errors=True)
    report = SearchReport(**line["report"])
    context.observer.note(report.line)
    return Searched(widths=line["widths"], report=report)


@dataclass(slots=True, kw_only=True)
class _Loop:
    """One search."""

    context: RunContext
    fitness: Fitness
    windows: SearchWindows
    start: Widths
    generations: list[SearchGeneration] = field(default_factory=list[SearchGeneration])
    bests: list[Choice] = field(default_factory=list[Choice])
    """What the search would have ended with after each generation."""
    runners_up: list[Choice] = field(default_factory=list[Choice])
    """The others of the last round, the best one first."""
    num_measured: int = 0
    anchors: list[AnchorReport] = field(default_factory=list[AnchorReport])
    """What single sublayers lose, where that was measured."""
    exact: Choice | None = None
    """The choice of least loss that follows from these."""

    @property
    def recipe(self) -> ResolvedUnits:
        return self.context.settings(ResolvedUnits)

    def run(self, costs: Costs) -> Searched:
        """Let the proposer propose until it has nothing more to say, and compare what it leaves with the start."""
        recipe, kinds = self.recipe, self.context.kinds
        slots, budget = search_menu(self.context.stock, recipe, kinds, costs)
        search = SEARCHES.get(recipe.search)
        options = search.options(recipe.search_generations, recipe.search_children, recipe.seed)
        start = self._choice(slots)
        if recipe.search_anchors:
            slots, first = self._anchored(slots, budget, start)
            proposer, reference = search.propose(slots, budget, first, options), start
        else:
            proposer = search.propose(slots, budget, start, options)
            reference = proposer.best()
        while asked := proposer.ask():
            if not all(budget.met(slots, choice) for choice in asked):
                raise UnsupportedError("a choice is over its limit", where=f"search {recipe.search!r}")
            self._generation(search, proposer, slots, list(asked), reference)
        chosen, report = self._judged(slots, reference)
        widths = self._widths(slots, chosen)
        check_shared_out(self.context.stock, recipe, widths)
        return Searched(widths=widths, report=report)

    def _anchored(self, slots: Sequence[Slot], budget: Budget, start: Choice) -> tuple[list[Slot], Choice]:
        """Scale the predicted losses by what single sublayers lose, and find the choice of the least."""

        def losses(choices: Sequence[Choice]) -> list[float]:
            found = self._measured(slots, choices, ANCHOR_RUNG, _ANCHORS, 0)
            return [one.loss for one in found]

        anchors = measure_anchors(slots, start, losses)
        self.anchors = [
            AnchorReport(
                block=slots[number].block,
                kind=slots[number].kind,
                kept_units=slots[number].variants[place].keep,
                predicted=slots[number].variants[place].price,
                measured=loss,
            )
            for number, (place, loss) in (
                *anchors.partial.items(),
                *((number, (-1, loss)) for number, loss in anchors.gone.items()),
            )
        ]
        corrected = anchors.corrected(slots)
        self.exact = anchors.choose(corrected, budget)
        return corrected, self.exact

    def _choice(self, slots: Sequence[Slot]) -> Choice:
        """Find the variants that the search starts from."""
        places: list[int] = []
        for slot in slots:
            wanted = self.start[slot.kind][slot.block]
            keeps = [variant.keep for variant in slot.variants]
            if wanted not in keeps:
                raise UnsupportedError(
                    f"the {self.recipe.allocator} allocator gives a width that no search could choose",
                    where=f"block {slot.block} {slot.kind}",
                    got=str(wanted),
                    wanted="another --allocator",
                )
            places.append(keeps.index(wanted))
        return tuple(places)

    def _widths(self, slots: Sequence[Slot], choice: Choice) -> Widths:
        """Return kind -> units of each block; sublayers without a slot keep what they have in the start."""
        kept = {kind: list(counts) for kind, counts in self.start.items()}
        for slot, count in zip(slots, kept_units(slots, choice), strict=True):
            kept[slot.kind][slot.block] = count
        return kept

    def _generation(
        self, search: Search, proposer: Proposer, slots: Sequence[Slot], asked: list[Choice], reference: Choice
    ) -> None:
        """Measure what was asked for, round after round, and tell the proposer."""
        started, generation, rounds = time.perf_counter(), len(self.generations), list[list[Measured]]()
        against: Measured | None = None
        for number, rung in enumerate(search.rungs):
            if rounds:
                asked = [one.choice for one in sorted(rounds[-1], key=lambda one: one.loss)]
            choices = asked if rung.choices is None else asked[: rung.choices]
            if last := number + 1 == len(search.rungs):
                choices = [*choices, *({proposer.best()} - set(choices))]
            # The start is measured with the last ones, so that generations can be compared.
            beside = [reference] if last and reference not in choices else []
            found = self._measured(slots, [*choices, *beside], rung, generation, number)
            rounds.append(found[: len(choices)])
            against = next((one for one in found if one.choice == reference), None)
        proposer.tell(rounds)
        self.bests.append(proposer.best())
        ranked = sorted(rounds[-1], key=lambda one: one.loss)
        self.runners_up = [one.choice for one in ranked]
        best = next((one for one in ranked if one.choice == self.bests[-1]), ranked[0])
        assert against is not None
        self.generations.append(
            SearchGeneration(
                num_choices=len(rounds[0]),
                loss=best.loss,
                start_loss=against.loss,
                seconds=time.perf_counter() - started,
            )
        )

    def _measured(
        self, slots: Sequence[Slot], choices: Sequence[Choice], rung: Rung, generation: int, number: int
    ) -> list[Measured]:
        """Measure choices on windows that are drawn for this round alone."""
        drawn = self.windows.drawn(rung, (self.recipe.seed, generation, number))
        losses = self._losses(
            [self._widths(slots, choice) for choice in choices],
            [0] * len(choices),
            drawn,
            f"search, {'single sublayers' if generation == _ANCHORS else f'generation {generation + 1}'}, round "
            f"{number + 1}: {len(choices)} choices{self._so_far()}",
        )
        texts = _texts(drawn)
        self.num_measured += len(choices)
        return [
            Measured(choice=choice, losses=each, figure=figure(each, texts, objective_of(self.recipe)))
            for choice, each in zip(choices, losses, strict=True)
        ]

    def _so_far(self) -> str:
        if not self.generations:
            return ""
        return f", best so far {self.generations[-1].change:+.1%}"

    def _losses(
        self,
        widths: Sequence[Mapping[str, Sequence[int]]],
        draws: Sequence[int],
        windows: Sequence[Sequence[int]],
        description: str,
    ) -> list[tuple[float, ...]]:
        """Measure candidates on the windows of all texts, text after text."""
        numbers = [number for text in windows for number in text]
        ascending = tuple(sorted(numbers))
        found = self.fitness.measure(
            Measurement(widths=widths, draws=draws, windows=ascending, description=description)
        )
        places = [ascending.index(number) for number in numbers]
        return [tuple(each[place] for place in places) for each in found]

    def _finalists(self, reference: Choice) -> list[Choice]:
        """Return the last few choices that were best, and the exact one for corrected losses."""
        in_order = dict.fromkeys([*reversed(self.bests), *self.runners_up])
        found = [choice for choice in in_order if choice not in (reference, self.exact)]
        if self.exact is None or self.exact == reference:
            return found[:NUM_FINALISTS]
        return [*found[: NUM_FINALISTS - 1], self.exact]

    def _judged(self, slots: Sequence[Slot], reference: Choice) -> tuple[Choice, SearchReport]:
        """Compare the finalists with the start on windows that no generation saw; then with other units."""
        compete = [reference, *self._finalists(reference)]
        objective, texts = objective_of(self.recipe), _texts(self.windows.judged)
        losses = self._losses(
            [self._widths(slots, choice) for choice in compete],
            [0] * len(compete),
            self.windows.judged,
            f"search, last comparison of {len(compete)} choices",
        )
        figures = [figure(each, texts, objective) for each in losses]
        harmless = [harms_none(losses[0], each, texts, objective) for each in losses]
        # One that harms a text is only reported, and only where all others do too.
        best = min(range(1, len(compete)), key=lambda number: (not harmless[number], figures[number]), default=0)
        gain = compared(losses[0], losses[best], texts, objective)
        clear = best > 0 and gain.counts
        taken = clear and harmless[best]
        chosen = best if taken else 0
        masks = self._other_units(self._widths(slots, compete[chosen]))
        report = SearchReport(
            name=self.recipe.search,
            generations=self.generations,
            anchors=self.anchors,
            num_measured=self.num_measured + len(compete) + NUM_MASKS,
            finalist_losses=figures[1:],
            num_windows=len(texts),
            seq_len=self.context.windows.ids_NS.shape[1],
            start_loss=figures[0],
            found_loss=figures[best],
            gain=gain.gain,
            standard_error=gain.standard_error if best and math.isfinite(gain.standard_error) else None,
            clear=clear,
            texts=self._distances(losses[0], losses[best]),
            taken=taken,
            num_masks=NUM_MASKS,
            masks_better=sum(loss < figures[chosen] for loss in masks),
            masks_loss=sum(masks) / NUM_MASKS,
            start_widths=self.start,
            found_widths=self._widths(slots, compete[best]),
            seconds=0.0,
        )
        return compete[chosen], report

    def _distances(self, before: Sequence[float], after: Sequence[float]) -> list[TextDistance]:
        """Say for each text how far two choices are from the dense model, on the windows of the last comparison."""
        judged = self.windows.judged
        names = [text.name for text in self.context.windows.texts] or [self.context.calibration_name]
        pairs = (of_each_text(losses, _texts(judged)) for losses in (before, after))
        return [
            TextDistance(name=name, num_windows=len(windows), before=old, after=new)
            for name, windows, old, new in zip(names, judged, *pairs, strict=True)
        ]

    def _other_units(self, widths: Widths) -> list[float]:
        """Measure draws of other units at these widths, on the windows of the last comparison."""
        losses = self._losses(
            [widths] * NUM_MASKS,
            range(1, NUM_MASKS + 1),
            self.windows.judged,
            f"search, {NUM_MASKS} draws of other units",
        )
        texts = _texts(self.windows.judged)
        return [figure(each, texts, objective_of(self.recipe)) for each in losses]


def _texts(windows: Sequence[Sequence[int]]) -> list[int]:
    """Return the text of each window."""
    return [text for text, numbers in enumerate(windows) for _ in numbers]
