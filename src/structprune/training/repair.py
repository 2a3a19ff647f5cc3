"""The repair of `prune`: behind the last block the pruned model learns from the dense one, matrices left as they are.

It is a distillation in mode scales (stream.py), one window a step, on windows of the calibration's texts that nothing
else was fitted on: the pruned model meets those that its weights were solved for better than any other text (by 0.28
nats per token instead of 0.37 on SmolLM2), and shows little there of what could be mended. The last windows of every
text are not learned from: they say which pass over the others is kept, if any, by the mean of the texts or by the one
that is furthest from the dense model. The run's held-out windows take no part, so what the report says of them stays a
measurement.

With biases, the pruned model first gets zeros for those that its consumers lack and its config has an entry for. Where
the entry gives biases to a sublayer's other maps too, those stay zero.

Shape suffixes: N windows, S positions, D hidden size.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structprune.architectures.stock.model import StockModel
from structprune.architectures.units import missing_biases
from structprune.checkpoint.writer import ModelWriter
from structprune.engine.run.assembled import assembled
from structprune.engine.run.context import Repair, Repaired, RunContext
from structprune.engine.streaming.final_states import load_final_states, save_final_states
from structprune.engine.streaming.losses import last_states
from structprune.engine.streaming.model import StreamedModel
from structprune.memory import release_free_memory
from structprune.phases import Phase
from structprune.recipe.repaired import repair_epochs, repair_of, repair_windows
from structprune.recipe.training import RecoverySettings
from structprune.results.schema import RepairReport
from structprune.training.calibrated import on_calibration
from structprune.training.context import RecoveryContext, Workplace
from structprune.training.loop import History, distil
from structprune.training.parameters import ScaleParameters, scales_of
from structprune.training.snapshots import going_on
from structprune.training.stream import Learning, StreamedStudent, learned
from structprune.types import UNIT_KINDS, BlockLayout, UnitKind

_STEP = "repair"
_FINAL = "repaired states"


def repair_by_scales(
    context: RunContext, writer: ModelWriter, config: Mapping[str, Any], *, adds_biases: bool
) -> Repaired:
    """Let norms, biases and scales of the pruned model learn, or go on with what an interrupted process left of it.

    Raises NumericalError for gradients that are not finite.
    """
    folder = context.run.staging / "repair"
    folder.mkdir(exist_ok=True)
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    pruned = _Pruned(context=context, writer=writer, config=config)
    biased = _with_biases(pruned, folder / "plain") if adds_biases else pruned
    new = writer.beside(shards)
    journal = context.run.journal
    line, final = journal.find(_STEP), load_final_states(journal, _FINAL)
    if line is None or final is None:
        report = _learn(biased, new, folder)
        files = [new.path(number) for number in range(1, new.num_shards + 1)] if report.changed else []
        line = journal.record(_STEP, files, report=report.model_dump(mode="json"))
        final = load_final_states(journal, _FINAL)
        assert final is not None
    report = RepairReport(**line["report"])
    if not report.changed:
        return Repaired(writer=writer, pruned_NSD=None, config=config, report=report)
    for number in range(1, new.num_shards + 1):
        new.adopt(number)
    return Repaired(writer=new, pruned_NSD=final["pruned"], config=biased.config, report=report)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pruned:
    """The model that learns, as it is before: shards, config, and zeros for the biases that it gets."""

    context: RunContext
    writer: ModelWriter
    config: Mapping[str, Any]
    zeros: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Full name -> tensor."""
    still: frozenset[str] = frozenset()
    """Names of zeros that do not learn: the config gives a sublayer's maps biases all or none."""
    new_biases: tuple[UnitKind, ...] = ()
    no_biases: tuple[UnitKind, ...] = ()

    def learning(self, streamed: StreamedModel, block: BlockLayout) -> ScaleParameters:
        """Return what of a block learns."""
        return scales_of(streamed, block, self.still)

    def assembled(self, directory: Path) -> StockModel:
        """Open it as stock code would; `directory` is emptied."""
        return assembled(self.context, self.writer, self.config, directory, self.zeros)


def _with_biases(pruned: _Pruned, directory: Path) -> _Pruned:
    """Give the consumers zeros for the biases that they lack, where the config of the result has an entry for them."""
    stock = pruned.assembled(directory)
    blocks = stock.layout.blocks
    lacking = [group for block in blocks for group in block.groups if group.consumer_bias is None]
    able = {group.kind: group.bias_field for group in lacking if group.bias_field is not None}
    zeros = {
        block.prefix + name: torch.zeros(shape, dtype=stock.reader.dtypes[f"{block.prefix}{name[:-4]}weight"])
        for block in blocks
        for name, shape in missing_biases(block).items()
    }
    return replace(
        pruned,
        config={**pruned.config, **dict.fromkeys(able.values(), True)},
        zeros=zeros,
        still=frozenset(zeros) - {block.prefix + group.bias_name for block in blocks for group in block.groups},
        new_biases=tuple(kind for kind in UNIT_KINDS if kind in able),
        no_biases=tuple(kind for kind in UNIT_KINDS if kind not in able and kind in {g.kind for g in lacking}),
    )


def _learn(pruned: _Pruned, new: ModelWriter, folder: Path) -> RepairReport:
    """Distil, write the blocks with what was learned, and keep the last hidden states of the reported windows."""
    started = time.perf_counter()
    context = pruned.context
    student = pruned.assembled(folder / "pruned")
    recovery = _recovery_context(context, student)
    place = Workplace(folder=folder / "state", scratch=folder / "scratch")
    place.folder.mkdir(exist_ok=True)
    history, num_learned = going_on(
        partial(_distilled, recovery, place, pruned.learning),
        place.folder,
        place.scratch,
        lambda error: context.observer.note(f"{error}; the repair begins anew"),
    )
    changed = history.best.step > 0
    states: dict[str, torch.Tensor] = {}
    if changed:
        with context.meter.phase(Phase.REPAIR):
            for block in student.layout.blocks:
                new.write_block(
                    block.index, learned(recovery.student, block, pruned.learning, place.scratch / "result")
                )
                release_free_memory()
        repaired = replace(pruned, writer=new, zeros={}).assembled(folder / "repaired")
        probe = replace(recovery.student, stock=repaired, windows=context.windows).on_windows(
            tuple(range(context.num_probe))
        )
        with contextlib.closing(last_states(probe, folder / "probe.bin", Phase.REPAIR)) as store:
            states["pruned"] = store.read(0, context.num_probe).clone()
    save_final_states(context.run.journal, states, step=_FINAL)
    shutil.rmtree(place.scratch)
    release_free_memory()
    return RepairReport(
        mode=repair_of(context.recipe) or "none",
        num_learned=num_learned,
        num_windows=len(recovery.texts.all_train),
        num_measured=len(recovery.texts.all_held_out),
        num_apart=min(context.windows.num_repair, len(recovery.teacher.windows.ids_NS)),
        steps=history.step,
        divergence_before=history.evaluations[0].divergence,
        divergence_after=history.best.divergence,
        changed=changed,
        new_biases=list(pruned.new_biases) if changed else [],
        no_biases=list(pruned.no_biases),
        seconds=time.perf_counter() - started,
    )


def _recovery_context(context: RunContext, student: StockModel) -> RecoveryContext:
    settings = RecoverySettings(
        mode="scales",
        seq_len=context.windows.ids_NS.shape[1],
        batch=1,
        epochs=repair_epochs(context.recipe),
        seed=context.recipe.seed,
    )
    num_windows = repair_windows(context.recipe, len(context.windows.ids_NS))
    return on_calibration(context, student, settings, context.windows.for_repair(num_windows))


def _distilled(context: RecoveryContext, place: Workplace, learning: Learning) -> tuple[History, int]:
    """Leave the best values in the scratch folder; return what happened, and how many numbers could change."""
    with contextlib.closing(StreamedStudent(context, place.scratch, learning)) as student:
        with context.student.meter.phase(Phase.REPAIR):
            history = distil(context, student, place, "repair")
        result = place.scratch / "result"
        result.mkdir()
        student.save(result, moments=False)
        num_learned = student.num_parameters
    release_free_memory()
    return history, num_learned


SCALES = Repair(run=partial(repair_by_scales, adds_biases=False))
SCALES_AND_BIASES = Repair(run=partial(repair_by_scales, adds_biases=True))
