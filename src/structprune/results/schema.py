"""The report of one pruning run. `schema_version` rises when a field changes its meaning or goes away."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializeAsAny

from structprune.errors import InputError
from structprune.recipe import ResolvedRecipe
from structprune.results.frozen import Frozen
from structprune.results.gates import GatesReport
from structprune.results.memory import MemoryReport
from structprune.results.search import SearchReport
from structprune.results.sizes import LimitReport, SizeReport, ZerosReport
from structprune.results.texts import CalibrationReport, HeldOutReport

if TYPE_CHECKING:
    from pandas import DataFrame

SCHEMA_VERSION = 1
REPORT_NAME = "pruning_report.json"


class BlockReport(Frozen):
    """One unit group of one block; with kind `block` the block as a whole; of a sliced stream, one sublayer of it.

    Where single weights went, one linear map, those of all experts together.
    """

    block: int
    """Number of the block in the source."""
    kind: str
    """The kind of unit or expert; where single weights went, the name of the map in the block."""
    num_units: int
    kept_units: int
    """Where the stream is sliced: its dimensions before and after; where single weights went, the weights of the map
    and those that are not zero."""
    error_mask_only: float | None
    """|W x - W_K x_K|^2 / |W x|^2 over the calibration tokens, before any weight update."""
    error: float | None
    """The same after the solver. Where the stream is sliced: share of its energy that the cut before the sublayer
    drops.
    """
    status: str
    statistics: dict[str, float]
    objective: list[float]
    """Objective of an iterative solver, before its first step and after each; empty for the others."""
    seconds: float


class RepairReport(Frozen):
    """What was learned from the dense model behind the last block."""

    mode: str
    num_learned: int
    """Numbers that could change."""
    num_windows: int
    """Calibration windows that were learned from."""
    num_measured: int
    """Calibration windows that said whether it helped."""
    num_apart: int = 0
    """Windows of both kinds that nothing else was fitted on; reports of earlier versions name none."""
    steps: int
    divergence_before: float
    """Mean KL divergence from the dense model on those, in nats per token; with `--objective worst` that of the text
    where it is largest."""
    divergence_after: float
    """The same of what was kept."""
    changed: bool
    """False where nothing met those windows better: the result is as it was."""
    new_biases: list[str] = Field(default_factory=list[str])
    """Sublayers that have biases now and had none."""
    no_biases: list[str] = Field(default_factory=list[str])
    """Sublayers that were to have biases, for which the model's config has no entry."""
    seconds: float


class ReusedStatistics(Frozen):
    """Measurements of the dense model that an earlier run had taken; not part of this run's seconds and peak."""

    seconds: float
    peak_bytes: int


class ReloadReport(Frozen):
    """How the finished checkpoint fared in a fresh process with stock code; a mismatch ends the run instead."""

    mode: Literal["whole", "streamed", "impossible", "off"]
    """whole: `from_pretrained`; streamed: the same classes, each module's weights read when it runs."""
    reason: str = ""
    """Why not whole."""
    num_positions: int = 0
    relative_difference: float | None = None
    """|a - b| / |b| over the logits of that process and of the run, each position's mean taken off."""
    tolerance: float | None = None
    max_abs_difference: float | None = None
    same_top1: float | None = None
    """Share of the positions with the same likeliest token."""
    planned_bytes: int | None = None
    """Planned bytes of both processes, libraries not counted."""
    peak_bytes: int | None = None
    """Peak of the loading process alone."""
    seconds: float = 0.0


class RuntimeReport(Frozen):
    """Whether one runtime loads the output, as far as known."""

    runtime: str
    loads: Literal["yes", "no", "unverified"]
    basis: Literal["checked", "by its source"] | None
    reason: str


class FilesReport(Frozen):
    """What became of the files beside the weights that were read; folders end in a slash."""

    carried: list[str]
    """Copied as they are."""
    rewritten: list[str]
    left_out: dict[str, str]
    """Name -> reason."""


class AdapterReport(Frozen):
    """A LoRA adapter that was merged into the source's weights before anything else."""

    path: str
    content: str
    """SHA-256 of its weights and settings."""
    num_updated: int
    """Tensors that a low-rank product was added to."""
    num_replaced: int
    """Tensors that the adapter has in whole."""


_MEASURED_BY = {"loss": "loss of text that was not counted", "divergence": "divergence from all rows"}


class MergedRowsReport(Frozen):
    """Head rows of first pieces that were fitted to carry what missing tokens would have been given."""

    num_rows: int
    """Rows that were fitted."""
    num_missing: int
    """Tokens that are gone and begin with one of them."""
    num_positions: int
    """Positions of the calibration windows that they were fitted on."""
    num_measured: int
    """Windows beside those that said whether they stay."""
    measure: Literal["loss", "divergence"]
    """loss: mean loss per token, in nats, of windows whose text tokens were not counted on; bits per byte follow it.
    divergence: where there is no such text, the mean KL divergence, in nats, from what the same states and all of the
    source's rows predict, each missing token at its first piece. None of a counted text's own tokens is missing."""
    before: float
    after: float
    """The same measure of what was kept."""
    changed: bool
    """False where the new rows did not lower it: the old ones stayed."""
    seconds: float

    @property
    def line(self) -> str:
        """Say what came of it."""
        measured = f"{self.num_measured} windows that they were not fitted on but chosen by"
        if not self.changed:
            return f"the head's rows are as they were: merged ones were no better on {measured}"
        return (
            f"{self.num_rows:,} head rows carry {self.num_missing:,} of the missing tokens, "
            f"{_MEASURED_BY[self.measure]} {self.before:.4f} -> {self.after:.4f} on {measured}"
        )


class VocabularyReport(Frozen):
    """Tokens that were taken out of the source's vocabulary before anything else."""

    before: int
    """Rows of the source's embedding."""
    after: int
    parameters: int
    """Numbers that went with them; they are in the parameters before."""
    parameters_before: int | None = None
    """Numbers of the source's rows, embedding and head; None in reports of earlier versions."""
    covered: float
    """Share of the tokens of the texts, that the choice was made by, that stay: the mean of the texts."""
    texts: tuple[str, ...]
    num_tokens: int
    """Tokens of those texts."""
    merged: MergedRowsReport | None = None
    """None: nothing was fitted."""

    @property
    def line(self) -> str:
        """Say how many tokens stay, and what went with the others."""
        before = self.parameters_before
        went = f"{self.parameters:,} parameters fewer" + (f" of the {before:,} of their rows" if before else "")
        return (
            f"{self.after:,} of {self.before:,} tokens stay, {went}; {self.covered:.3%} of the {self.num_tokens:,} "
            "tokens that were counted" + ("" if self.merged is None else f"; {self.merged.line}")
        )


class PruneFacts(Frozen):
    """Everything that a run states about itself."""

    schema_version: int = SCHEMA_VERSION
    output: str
    source: str
    source_fingerprint: str
    source_commit: str | None = None
    """The hub's commit that a branch or tag stood for; None for a model that is not from the hub."""
    adapter: AdapterReport | None = None
    """None: the source's own weights."""
    vocabulary: VocabularyReport | None = None
    """None: all tokens stay."""
    family: str
    method: str
    recipe: SerializeAsAny[ResolvedRecipe]
    """What the run worked by, with the fields that its pipeline has."""
    device: str
    compute_dtype: str
    held_out: HeldOutReport | None = None
    """None: no window was held out, as in reports of earlier versions; what is known is in-sample only."""
    calibration: CalibrationReport
    size: SizeReport
    zeros: ZerosReport | None = None
    """None where whole units went, and in reports of earlier versions."""
    predicted_loss: float | None = None
    """What the removals are predicted to add to the loss, in nats per token: the sum of what each was measured to cost
    the dense model. None where that was not measured."""
    limits: list[LimitReport] = Field(default_factory=list[LimitReport])
    """Limits that decided the widths; empty where a share did, and in reports of earlier versions."""
    memory: MemoryReport
    blocks: list[BlockReport]
    reused: ReusedStatistics | None = None
    gates: GatesReport | None = None
    """None: there were none."""
    search: SearchReport | None = None
    """None: there was none."""
    repair: RepairReport | None = None
    """None: there was none."""
    reload: ReloadReport
    num_ranks: int = 1
    """Processes that shared the work, those of the last start if there were several."""
    runtimes: list[RuntimeReport]
    notes: tuple[str, ...] = ()
    """What was found in the source that a person should know, a sentence each."""
    files: FilesReport | None = None
    """None in reports of earlier versions."""
    same_tokens: bool | None = None
    """Whether the output's tokenizer gave the source's ids on a probe text; a difference ends the run instead."""
    wall_seconds: float
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return self.model_dump(mode="json")

    def to_frame(self) -> DataFrame:
        """Build one row per unit group of a block, statistics as columns. Raises InputError without pandas."""
        try:
            import pandas
        except ImportError:
            raise InputError("to_frame needs pandas", do="install it with `pip install pandas`") from None
        rows = [
            block.model_dump(exclude={"statistics", "objective"})
            | {"kept_share": block.kept_units / block.num_units}
            | block.statistics
            for block in self.blocks
        ]
        return pandas.DataFrame(rows)
