"""The report of one recovery, and what the model card says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from structprune.files import plain_name
from structprune.results.frozen import Frozen
from structprune.results.memory import MemoryReport
from structprune.results.schema import FilesReport, ReloadReport

RECOVERY_SCHEMA_VERSION = 1


class RecoveredBlock(Frozen):
    """One block of the student, trained alone."""

    block: int
    """Number of the block in the student."""
    target: int
    """After how many of the teacher's blocks its output is compared."""
    error_before: float
    """Mean over the held-out tokens of |output - wanted|^2 / |wanted|^2, on the recovered student's stream."""
    error_after: float
    """The same with the weights that were kept."""
    epochs: int
    """Passes over the windows, the last one perhaps cut by the clock."""
    tokens: int
    """Learned from, each as often as it was seen."""
    changed: bool
    """False where no pass met the held-out windows better: the block stays as it was."""
    seconds: float


class TraceStep(Frozen):
    """One step of the optimiser."""

    step: int
    """Number of the step, from 1."""
    seconds: float
    loss: float
    """Mean KL divergence from the teacher over the step's tokens, in nats, before the step."""


class Evaluation(Frozen):
    """The held-out windows after so many steps."""

    step: int
    seconds: float
    divergence: float
    """Mean KL divergence from the teacher per token: of all texts, which count alike here, and of each. Where the
    worst text is what a repair goes by, the largest of them instead of their mean."""
    by_text: list[float]


class TextReport(Frozen):
    """One text's windows and what became of them."""

    name: str
    train_windows: int
    held_out_windows: int
    share: float
    """Share of the windows that were drawn for training; 0 where none was."""


class Quality(Frozen):
    """Quality of one model on all held-out windows."""

    perplexity: float
    divergence: float
    """Mean KL divergence from the teacher, in nats per token."""


class RecoveryReport(Frozen):
    """Everything that a recovery states about itself."""

    schema_version: int = RECOVERY_SCHEMA_VERSION
    output: str
    student: str
    teacher: str
    student_fingerprint: str
    teacher_fingerprint: str
    notes: list[str] = Field(default_factory=list[str])
    """What a reader should know of the pair; empty in reports of earlier versions."""
    settings: dict[str, Any]
    """Resolved."""
    device: str
    compute_dtype: str
    texts: list[TextReport]
    description: str
    fingerprint: str
    """Fingerprint of the token windows."""
    seq_len: int
    start: str = ""
    """The start token that every window begins with; empty where there is none, and in reports of earlier versions."""
    dense_perplexity: float
    """Perplexity of the teacher on the held-out windows."""
    before: Quality
    after: Quality
    tokens: int
    """Learned from, each as often as it was seen; in mode blocks the mean over the blocks."""
    blocks: list[RecoveredBlock]
    trace: list[TraceStep]
    evaluations: list[Evaluation]
    memory: MemoryReport
    reload: ReloadReport
    files: FilesReport | None = None
    """Files of the student's folder; None in reports of earlier versions."""
    train_seconds: float
    wall_seconds: float
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return self.model_dump(mode="json")


def recovery_card(report: RecoveryReport) -> str:
    """Write the paragraph that a recovery adds to the model card."""
    windows = sum(text.held_out_windows for text in report.texts)
    return (
        "## Recovery\n\n"
        f"After pruning the weights learned from `{plain_name(Path(report.teacher).name)}` (mode "
        f"`{report.settings['mode']}` of structprune {report.versions['structprune']}, {report.tokens:,} tokens, "
        f"{plain_name(report.description)}). On {windows} "
        f"held-out windows of {report.seq_len} tokens of that text the KL divergence from it went from "
        f"{report.before.divergence:.4f} to {report.after.divergence:.4f} nats per token, the perplexity from "
        f"{report.before.perplexity:.2f} to {report.after.perplexity:.2f} (dense {report.dense_perplexity:.2f}). "
        "All figures are in `recovery_report.json`.\n"
    )
