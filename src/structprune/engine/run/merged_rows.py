"""Head rows that carry what the tokens that are gone would have been given, where a vocabulary got smaller.

The model as it will be written passes the run's windows once. At every position the source's head says what each
missing token would have got there, and rows of the first pieces are fitted to have that too (row_fit.py). Some windows,
the last ones of every text, are not fitted on: they choose the ridge and how far the rows go, and the new rows stay
only if the finished model does better there. Where embedding and head are one matrix it has the new rows at its input
too, so that less of the steps can be more.

Better is a lower loss, so fewer bits per byte, on windows of texts that tokens were not counted on. A counted text
cannot tell: none of its tokens is missing, and what others gain does not show. Without any other text better is nearer
to what the old states and all of the source's rows predict, with missing tokens at their first pieces.

Shape suffixes: G pieces whose rows change, V vocabulary, D hidden size, N windows, S positions of a window.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from structprune.architectures.stock.head import head_parts
from structprune.architectures.stock.model import StockModel
from structprune.calibration.store import FileStore, HiddenStore
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.run.assembled import assembled
from structprune.engine.run.context import RunContext
from structprune.engine.run.row_fit import RowFit, missing_rows, pieces_of
from structprune.engine.streaming.final_states import load_final_states, save_final_states
from structprune.engine.streaming.losses import last_states, summed_loss
from structprune.engine.streaming.model import StreamedModel
from structprune.errors import UnsupportedError
from structprune.memory import release_free_memory
from structprune.phases import Phase
from structprune.recipe.training import divided
from structprune.results.schema import MergedRowsReport
from structprune.vocabulary.merged import ROWS, SHARES

_STEP = "merged rows"
_FINAL = "states with merged rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedRows:
    """What merging leaves."""

    writer: ModelWriter
    """The shards that count."""
    pruned_NSD: Tensor | None
    """New last hidden states of the reported windows; None: they are as they were."""
    stock: StockModel | None
    """The model with the new rows; None: nothing changed."""
    report: MergedRowsReport


def merge_rows(context: RunContext, writer: ModelWriter, config: Mapping[str, Any]) -> MergedRows:
    """Fit the head's rows, or go on with what an interrupted process left of it.

    Raises NumericalError for states that are not finite.
    """
    folder = context.run.staging / "merged-rows"
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    changed = 1 if context.stock.layout.tied_embeddings else writer.num_shards
    others = [number for number in range(1, writer.num_shards + 1) if number != changed]
    new = writer.beside(folder / "shards", others)
    journal = context.run.journal
    line, final = journal.find(_STEP), load_final_states(journal, _FINAL)
    if line is None or final is None:
        work = _Merging(context=context, writer=writer, config=config, folder=folder, new=new, changed=changed)
        report, states = work.run()
        save_final_states(journal, states, step=_FINAL)
        journal.record(_STEP, [new.path(changed)] if report.changed else [], report=report.model_dump(mode="json"))
        final = states
    else:
        report = MergedRowsReport(**line["report"])
    if not report.changed:
        return MergedRows(writer=writer, pruned_NSD=None, stock=None, report=report)
    new.adopt(changed)
    stock = assembled(context, new, config, folder / "merged")
    return MergedRows(writer=new, pruned_NSD=final["pruned"], stock=stock, report=report)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merging:
    context: RunContext
    writer: ModelWriter
    config: Mapping[str, Any]
    folder: Path
    new: ModelWriter
    """Where the shard with the new rows goes."""
    changed: int
    """Number of that shard."""

    def run(self) -> tuple[MergedRowsReport, dict[str, Tensor]]:
        """Fit, choose, write the shard and see if it helps: what happened, and new states of the reported windows."""
        started = time.perf_counter()
        context, folder = self.context, self.folder
        context.observer.start("merged rows", 4)
        with context.meter.phase(Phase.MERGED_ROWS):
            pieces = pieces_of(context)
        release_free_memory()
        context.observer.advance(f"{len(pieces.rows_G):,} rows")
        if not len(pieces.rows_G):
            raise UnsupportedError(
                "no token that is gone has a first piece, so there are no rows to merge",
                got="--merge-rows",
                do="leave --merge-rows out",
            )
        before = assembled(context, self.writer, self.config, folder / "before")
        fitted, judged = _divided(context)
        scratch = folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        states: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            store = last_states(self._streamed(before), scratch / "states.bin", Phase.MERGED_ROWS)
            stack.callback(store.close)
            context.observer.advance("states")
            with context.meter.phase(Phase.MERGED_ROWS):
                head = head_parts(before.load_head(context.device, context.dtype))
                missing = stack.enter_context(missing_rows(context, pieces, scratch))
                fit = RowFit(context=context, head=head, pieces=pieces, missing=missing, scratch=scratch)
                steps, num_positions = fit.steps(store, fitted)
                for each in steps:
                    stack.callback(each.close)
                release_free_memory()
                context.observer.advance(f"fitted on {num_positions:,} positions")
                old, choices = fit.divergences(store, judged, steps)
                _, number, most = min((value, *choice) for choice, value in choices.items())
                if loses := uncounted(context, judged):
                    judged = loses
                    whole = nn.Sequential(head.norm, head.projection, head.changes)
                    old = self._loss(whole, store, {number: number for number in judged})
                    del whole
            found = old
            for share in (share for share in SHARES if share <= most):
                with context.meter.phase(Phase.MERGED_ROWS):
                    self._write(before, pieces.rows_G, steps[number], share)
                release_free_memory()
                states["pruned"], found = self._judge(judged, fit, store, by_loss=bool(loses))
                if found < old:
                    break
            del head, fit
        helped = found < old
        what = "loss" if loses else "KL, missing tokens at their first pieces,"
        said = "" if helped else ", so the rows stay as they are"
        context.observer.advance(f"{what} {old:.4f} -> {found:.4f}{said}")
        release_free_memory()
        shutil.rmtree(scratch)
        report = MergedRowsReport(
            num_rows=len(pieces.rows_G),
            num_missing=len(pieces.of_missing),
            num_positions=num_positions,
            num_measured=len(judged),
            measure="loss" if loses else "divergence",
            before=old,
            after=min(old, found),
            changed=helped,
            seconds=time.perf_counter() - started,
        )
        return report, states

    def _streamed(self, stock: StockModel, windows: Sequence[int] | None = None) -> StreamedModel:
        context = self.context
        model = StreamedModel(
            stock=stock,
            windows=context.windows,
            plan=context.plan,
            device=context.device,
            dtype=context.dtype,
            meter=context.meter,
        )
        return model if windows is None else model.on_windows(tuple(windows))

    def _write(self, before: StockModel, rows_G: Tensor, step: FileStore, share: float) -> None:
        """Write the shard with the new rows."""
        embeddings = before.embedding_tensors()
        names = [n for n in before.layout.outer_tensors if (n in embeddings) == (self.changed == 1)]
        tensors = self.writer.read(self.changed, names)
        _step(tensors[before.head_weight], rows_G, step, share)
        self.new.write(self.changed, tensors)

    def _judge(self, judged: Sequence[int], fit: RowFit, store: HiddenStore, *, by_loss: bool) -> tuple[Tensor, float]:
        """Let the model with the new rows pass the windows: (states of the reported ones, how the judged fare)."""
        context, folder = self.context, self.folder
        stock = assembled(context, self.new, self.config, folder / "merged")
        streamed = self._streamed(stock, [*range(context.num_probe), *judged])
        with contextlib.closing(last_states(streamed, folder / "scratch" / "judged.bin", Phase.MERGED_ROWS)) as new:
            with context.meter.phase(Phase.MERGED_ROWS):
                head = stock.load_head(context.device, context.dtype)
                places = dict(enumerate(judged, context.num_probe))
                found = self._loss(head, new, places) if by_loss else fit.divergence_of(head, new, places, store)
                del head
            states = new.read(0, context.num_probe).clone()
        release_free_memory()
        return states, found

    def _loss(self, head: nn.Module, store: HiddenStore, places: Mapping[int, int]) -> float:
        """Compute the mean loss per token of windows: place in the store -> number of the window."""
        device, ids_NS = self.context.device, self.context.windows.ids_NS
        total = sum(
            summed_loss(head, store.read(place, place + 1)[0, :-1].to(device), ids_NS[number, 1:].to(device))
            for place, number in places.items()
        )
        return total / (len(places) * (ids_NS.shape[1] - 1))


def uncounted(context: RunContext, windows: Sequence[int]) -> list[int]:
    """Return those of the windows whose text tokens were not counted on.

    The list of tokens has the texts' names as they were given: a file of the same name in another folder is taken for
    the one that was counted.
    """
    counted = {Path(name).name for name in context.recipe.tokens.texts}
    texts = context.windows.texts
    if not texts:
        return [] if Path(context.calibration_name).name in counted else list(windows)
    of_others = {number for text in texts if Path(text.name).name not in counted for number in text.windows}
    return [number for number in windows if number in of_others]


def _divided(context: RunContext) -> tuple[tuple[int, ...], list[int]]:
    """Divide the windows into those that are fitted on and those, the last ones of each text, that are not."""
    texts = [text.windows for text in context.windows.texts if text.windows]
    fitted, judged = divided(texts or [tuple(range(len(context.windows.ids_NS)))])
    return fitted, sorted(itertools.chain(*judged))


def _step(weight_VD: Tensor, rows_G: Tensor, step: FileStore, share: float) -> None:
    """Add this much of the steps to the rows, in place."""
    for start in range(0, len(rows_G), ROWS):
        rows = rows_G[start : start + ROWS].to(weight_VD.device)
        step_GD = step.read(start, min(start + ROWS, len(rows_G)))[:, 0].to(weight_VD.device)
        weight_VD[rows] = (weight_VD[rows].float() + share * step_GD).to(weight_VD.dtype)
