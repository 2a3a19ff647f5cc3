"""A recovery's inputs, decided and checked before the first weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from structprune.architectures.sources.adapter import NO_ADAPTER
from structprune.architectures.stock.loading import has_own_modeling_file
from structprune.architectures.stock.model import StockModel
from structprune.calibration.select import fingerprint
from structprune.checkpoint.reader import CheckpointReader
from structprune.engine.run.finalize import MANIFEST_NAME
from structprune.engine.streaming.model import StreamedModel
from structprune.errors import CheckpointError, InputError, StructPruneError, UnsupportedError
from structprune.files import read_json
from structprune.observer import Observer, SilentObserver
from structprune.recipe.training import RecoverySettings, ResolvedRecovery
from structprune.results.recovery import Evaluation, RecoveredBlock, TraceStep
from structprune.results.schema import REPORT_NAME
from structprune.runs.contents import file_contents, sums
from structprune.texts import OBJECTIVES, Objective
from structprune.training.texts import Texts
from structprune.types import BlockLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryContext:
    """Everything that a mode needs."""

    teacher: StreamedModel
    student: StreamedModel
    settings: ResolvedRecovery
    """Resolved."""
    texts: Texts
    targets: tuple[int, ...]
    """Number of teacher blocks, for each student block, whose output it should match; () if not known."""
    resident: bool
    """Whether what the optimiser keeps between steps stays in memory."""
    observer: Observer = field(default_factory=SilentObserver)
    objective: Objective = OBJECTIVES["mean"]
    """What the best state is the least of, over the texts."""

    def identity(self) -> dict[str, str]:
        """Return what must be the same for a run to continue where another was interrupted."""
        return {
            "settings": self.settings.fingerprint(),
            "teacher": _files(self.teacher.reader),
            "student": _files(self.student.reader),
            "windows": fingerprint(self.student.windows.ids_NS),
            "dtype": str(self.student.dtype),
        }


def _are_blocks(kept: Any, num_blocks: int) -> bool:
    if not isinstance(kept, list) or not all(type(index) is int and 0 <= index < num_blocks for index in kept):
        return False
    return kept == sorted(set(kept))


def _files(reader: CheckpointReader) -> str:
    """Hash which files these are: of one shape there may be many students, so contents count beside the fingerprint."""
    text = json.dumps([reader.fingerprint(), sums(file_contents(reader.content_files))])
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """The folders of one run."""

    folder: Path
    """Survives a kill."""
    scratch: Path
    """Does not need to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What a mode leaves."""

    tensors: Callable[[BlockLayout], Mapping[str, Tensor]]
    """The new tensors of a block of the student, relative names, in the dtype that they are stored in."""
    blocks: list[RecoveredBlock]
    """Blocks recovered in mode blocks; empty for the others."""
    trace: list[TraceStep]
    evaluations: list[Evaluation]
    tokens: int
    """Tokens that were learned from, each as often as it was seen."""
    drawn: list[int]
    """Windows learned from, per text, where their shares differ; empty where all are alike."""
    train_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeBytes:
    """What a mode needs beside streaming both models."""

    held: int
    """Bytes in memory, whatever happens."""
    numbers: int
    """Numbers of the block with most of them that learn at a time."""
    distils: bool = False
    """Whether predictions are compared while no block is there; else heads and logits count all the time."""
    weight_gradients: bool = True
    """Whether a backward pass makes derivatives as large as the block."""
    resident: int
    """Bytes of what may lie in memory or in files between steps."""
    disk: int
    """Bytes on disk for what a killed run resumes from, and for the result before it is written as a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to recover."""

    check: Callable[[tuple[int, ...], StockModel], None]
    """(target boundaries, student): raises a StructPruneError for what this mode cannot do."""
    bytes: Callable[[StockModel, RecoverySettings, int], ModeBytes]
    """(student, resolved settings, bytes per number of the forward passes)."""
    run: Callable[[RecoveryContext, Workplace], Recovered]
    """Raises NumericalError, CheckpointError."""
    keeps_zeros: bool = False
    """Whether what is zero in a matrix stays so; else a model whose single weights were pruned would lose its pattern.
    """


def teacher_notes(teacher: StockModel, student: StockModel, merge_adapter: str) -> list[str]:
    """Compare the teacher with what the student's own report and manifest say that it was pruned from."""
    found: list[str] = []
    directory = student.reader.directory
    source = _entry(directory / MANIFEST_NAME, "source_fingerprint")
    if isinstance(source, str) and source != teacher.reader.fingerprint():
        found.append("the teacher is not the model that the student was pruned from")
    if isinstance(_entry(directory / REPORT_NAME, "adapter"), dict) and merge_adapter == NO_ADAPTER:
        found.append(
            "the student was pruned with an adapter merged, which the teacher lacks: --merge-adapter merges it there"
        )
    return found


def check_zeros(mode: str, *, keeps_zeros: bool, student: StockModel) -> None:
    """Raise UnsupportedError where a mode would fill the zeros of a model whose single weights were pruned."""
    recipe = _entry(student.reader.directory / MANIFEST_NAME, "recipe")
    pattern = recipe.get("pattern") if isinstance(recipe, dict) else None
    if pattern is not None and not keeps_zeros:
        raise UnsupportedError(
            f"mode {mode!r} changes whole matrices, which would fill the zeros of pattern {pattern}",
            where=str(student.reader.directory),
            wanted="--mode scales, which keeps them",
        )


def _entry(path: Path, name: str) -> Any:
    """Return an entry of a JSON file that may be missing or damaged."""
    try:
        content = read_json(path) if path.is_file() else {}
    except StructPruneError:
        return None
    return content.get(name)


def check_pair(teacher: StockModel, student: StockModel) -> None:
    """Raise an error unless the student can learn from this teacher and be written: InputError or UnsupportedError.

    Or CheckpointError, where the student has a modelling file that is not ours.
    """
    has_own_modeling_file(student.reader.directory)
    for which, model in (("teacher", teacher), ("student", student)):
        if model.sliced:
            raise UnsupportedError(
                f"the {which} is a sliced model with shortcut matrices, whose stream stock blocks cannot carry",
                where=str(model.reader.directory),
                do="recover an output of another method",
            )
    for what, got, wanted in (
        ("vocabulary", student.layout.vocab_size, teacher.layout.vocab_size),
        ("hidden size", student.layout.hidden_size, teacher.layout.hidden_size),
    ):
        if got != wanted:
            raise InputError(
                f"teacher and student differ in {what}",
                where=str(student.reader.directory),
                got=f"{got} in the student, {wanted} in the teacher",
                wanted="the dense model that the student was pruned from",
                do="give that as --teacher",
            )


def target_boundaries(teacher: StockModel, student: StockModel) -> tuple[int, ...]:
    """Return the number of teacher blocks, for each student block, whose output it should match; () if not known.

    A block's output is compared behind the block that it was; the last one's at the teacher's end. Which blocks those
    were is in the student's manifest where blocks were removed from this teacher. Raises CheckpointError.
    """
    num_student, num_teacher = len(student.layout.blocks), len(teacher.layout.blocks)
    kept: Any = None
    path = student.reader.directory / MANIFEST_NAME
    if path.is_file():
        manifest = read_json(path)
        indices = manifest.get("kept_indices")
        if manifest.get("source_fingerprint") == teacher.reader.fingerprint() and isinstance(indices, dict):
            kept = indices.get("blocks")
            if kept is not None and not _are_blocks(kept, num_teacher):
                raise CheckpointError(
                    "the manifest names blocks that the teacher does not have",
                    where=str(path),
                    got=str(kept)[:100],
                    wanted=f"numbers below {num_teacher}, ascending",
                )
    if kept is None and num_student == num_teacher:
        kept = list(range(num_student))
    if kept is None or len(kept) != num_student:
        return ()
    return (*(index + 1 for index in kept[:-1]), num_teacher)
