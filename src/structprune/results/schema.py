"""The report of one pruning run. `schema_version` rises when a field changes its meaning or goes away."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from structprune.errors import InputError
from structprune.memory import format_bytes
from structprune.recipe import ResolvedRecipe
from structprune.results.frozen import Frozen
from structprune.results.gates import GatesReport
from structprune.results.search import SearchReport

if TYPE_CHECKING:
    from pandas import DataFrame

SCHEMA_VERSION = 1
REPORT_NAME = "pruning_report.json"


class Perplexities(Frozen):
    """Perplexities of the dense and of the pruned model over the same windows."""

    dense_perplexity: float
    pruned_perplexity: float

    @property
    def ratio(self) -> float:
        """How many times larger the perplexity has become."""
        return self.pruned_perplexity / self.dense_perplexity

    @property
    def excess(self) -> float:
        """Logarithm of that: by how many nats per token the loss has grown."""
        return math.log(self.ratio)


class HeldOutText(Perplexities):
    """What the result is worth on the held-out windows of one of several texts."""

    name: str
    num_windows: int

    @property
    def label(self) -> str:
        """The name without its folder, for what is made to be published."""
        return Path(self.name).name


class HeldOutReport(Perplexities):
    """What the result is worth on windows of the calibration texts that nothing was fitted on."""

    num_windows: int
    seq_len: int
    set_apart: bool
    """Whether the text had no windows beside those that were asked for, so that these are missing from the others."""
    fingerprint: str
    texts: list[HeldOutText] = Field(default_factory=list[HeldOutText])
    """The same for each text, where there are several."""
    num_bytes: int | None = None
    """Bytes of the text that the predicted tokens write; None: not counted."""

    @property
    def bits_per_byte(self) -> tuple[float, float] | None:
        """What it takes to tell a byte of the text, before and after; comparable between tokenizers."""
        if not self.num_bytes:
            return None
        tokens = self.num_windows * (self.seq_len - 1)
        before, after = (
            math.log2(one) * tokens / self.num_bytes for one in (self.dense_perplexity, self.pruned_perplexity)
        )
        return before, after


class CalibrationText(Frozen):
    """One of several texts that statistics were taken from."""

    name: str
    description: str
    weight: float
    num_windows: int


class CalibrationReport(Perplexities):
    """The text that statistics were taken from."""

    name: str
    description: str
    fingerprint: str
    num_windows: int
    seq_len: int
    start: str = ""
    """The start token that every window begins with; empty where there is none, and in reports of earlier versions."""
    perplexity_windows: int
    """The two perplexities are over the first so many calibration windows: in-sample, beside those of
    `PruneFacts.held_out` a sign of overfitting."""
    texts: list[CalibrationText] = Field(default_factory=list[CalibrationText])
    """Each text, where there are several."""


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


class ReachableShares(Frozen):
    """What share of the scope's parameters goes, beside the nearest that its units allow."""

    removed: float
    below: float
    """The largest that is less than what was asked for; 0 where there is none."""
    above: float
    """The smallest that is at least as much."""
    decided: bool = True
    """Whether `removed` is what goes. Before a run whose costs decide it is the most that may go, and at least `above`
    does."""


class SizeReport(Frozen):
    """Parameters and bytes, before and after."""

    parameters_before: int = Field(gt=0)
    parameters_after: int
    bytes_before: int = Field(gt=0)
    bytes_after: int
    dtypes: list[str] = Field(default_factory=list[str])
    """What the output's weights are stored in, that of the most bytes first; empty in reports of earlier versions."""
    removed_share_of_scope: float
    """Removed parameters over the parameters of the modules in scope: what `--sparsity` asks for."""
    reachable: ReachableShares | None = None
    """None in reports of earlier versions."""
    removed_share_of_blocks: float
    removed_share_of_model: float
    """Negative where the output is larger: slicing unties the head from the embedding, which then counts twice."""
    parameters_around: int = 0
    """Parameters of an image-text model around the text model that was pruned: they are in both counts, and stay."""

    @property
    def removed_share_of_text_model(self) -> float:
        """Removed parameters over those of the text model alone."""
        return (self.parameters_before - self.parameters_after) / (self.parameters_before - self.parameters_around)


Counted = Literal["numbers", "bytes", "nanoseconds"]
"""What an amount that is limited is counted in."""


def shown_amount(number: int, counts: Counted) -> str:
    """Write an amount with its unit."""
    if counts == "nanoseconds":
        return f"{number / 1e6:,.2f} ms"
    return f"{number:,} bytes" if counts == "bytes" else f"{number:,}"


class ZerosReport(Frozen):
    """Zeros that were put into the matrices in scope, where single weights went."""

    pattern: str
    asked: float
    """Share of zeros that the pattern wants."""
    weights: int
    """Weights of the matrices in scope."""
    zeros: int
    """Zeros among them, as they are stored."""
    nonzero_parameters: int
    """Parameters of the whole model less those zeros."""

    @property
    def share(self) -> float:
        """Share of zeros in scope."""
        return self.zeros / max(1, self.weights)


class LimitReport(Frozen):
    """A limit of what the result may have, such as of its parameters, and what it has."""

    name: str
    """What is counted, in words."""
    counts: Counted = "numbers"
    at_most: int
    """What was asked for."""
    before: int
    """What the result would have if no unit had gone."""
    predicted: int
    """What the chosen widths give by the source's headers; counts a repair's new biases, which it may leave out."""
    reached: int | None
    """What the written model has; None: that was not measured. A time is measured by `structprune bench`."""

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        """Read what reports of earlier versions say of bytes."""
        if not isinstance(values, dict) or "in_bytes" not in values:
            return values
        counted = {"counts": "bytes" if values["in_bytes"] else "numbers"}
        return {name: value for name, value in values.items() if name != "in_bytes"} | counted

    @property
    def is_missed(self) -> bool:
        """Whether the result has more than was asked for, or is predicted to where that was not measured."""
        return (self.predicted if self.reached is None else self.reached) > self.at_most

    @property
    def line(self) -> str:
        """Say what was asked, what the widths promised, and what the result has."""

        def shown(number: int) -> str:
            size = f" ({format_bytes(number)})" if self.counts == "bytes" else ""
            return f"{shown_amount(number, self.counts).removesuffix(' bytes')}{size}"

        asked = f"asked for at most {shown(self.at_most)}"
        if self.reached is None:
            dense = f"the dense model takes {shown(self.before)}"
            later = "`llama-quantize` makes it" if self.counts == "bytes" else "`structprune bench` measures it"
            return f"{asked}, predicted {shown(self.predicted)} ({dense}); {later}"
        predicted = "as predicted" if self.reached == self.predicted else f"predicted {shown(self.predicted)}"
        return f"{asked}, reached {shown(self.reached)}, {predicted}"


class RepairReport(Frozen):
    """What was learned from the dense model behind the last block."""

    mode: str
    num_learned: int
    """Numbers that could change."""
    num_windows: int
    """Calibration windows that were learned from."""
    num_measured: int
    """Calibration windows that said whether it helped."""
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


class MemoryStretch(Frozen):
    """The highest point of one stretch of the run, from the end of the stretch before it."""

    phase: str
    """What was going on, as the progress said it."""
    seconds: float
    """Time of the stretch's end, from the start of the run."""
    peak_bytes: int


class DeviceMemoryReport(Frozen):
    """Bytes on a CUDA device beside what the process had there before the run."""

    budget_bytes: int
    planned_peak_bytes: int
    measured_peak_bytes: int
    """Peak of the process that finished the run."""
    phases: dict[str, int]
    """Planned."""
    sums: Literal["device", "host"]
    """Where the sums of activations lay while they were taken."""
    solves: Literal["device", "host"] = "host"
    """Where units were chosen and consumers solved; before there was a choice, on the host."""


class MemoryReport(Frozen):
    """Bytes above the process's size before the run (libraries imported)."""

    budget_bytes: int
    planned_peak_bytes: int
    measured_peak_bytes: int
    phases: dict[str, int]
    """Planned."""
    measured_phases: dict[str, int] = Field(default_factory=dict[str, int])
    """Peaks of those of `phases` that were measured apart."""
    store: str
    micro_batch_windows: int
    cached: list[str] = Field(default_factory=list[str])
    """Sublayers whose consumer's inputs were kept in memory until it was solved."""
    cache_bytes: int = 0
    timeline: list[MemoryStretch] = Field(default_factory=list[MemoryStretch])
    """Empty in reports of the first version that had none."""
    device: DeviceMemoryReport | None = None
    """None: blocks ran in host memory."""


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

    @property
    def line(self) -> str:
        """Say how many tokens stay, and what went with the others."""
        before = self.parameters_before
        went = f"{self.parameters:,} parameters fewer" + (f" of the {before:,} of their rows" if before else "")
        return (
            f"{self.after:,} of {self.before:,} tokens stay, {went}; {self.covered:.3%} of the {self.num_tokens:,} "
            "tokens that were counted"
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
