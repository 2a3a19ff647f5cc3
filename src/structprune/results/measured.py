"""What was measured on a finished model: perplexities, tasks, speed. What `eval --json` and `bench --json` print."""

from __future__ import annotations

from typing import Any, Literal

from structprune.results.frozen import Frozen

MEASURED_VERSION = 1


class TextResult(Frozen):
    """One text."""

    text: str
    perplexity: float
    mean_nll: float
    seq_len: int
    stride: int
    """Tokens from the start of one window to the start of the next; the same as `seq_len`: no overlap."""
    num_windows: int
    num_predicted_tokens: int
    start: str = ""
    """The start token that every window begins with; empty where there is none, and in results of earlier versions."""
    kl_to_reference: float | None
    """Mean KL(reference, model) per predicted token, in nats; None without `--against`."""
    top1_agreement: float | None
    reference_perplexity: float | None
    num_bytes: int | None = None
    """Bytes of the text that the predicted tokens write; None in results of earlier versions."""
    bits_per_byte: float | None = None
    """Comparable between models of different vocabularies, as perplexity is not."""


class TaskResult(Frozen):
    """One zero-shot task, as lm-eval scores it."""

    task: str
    metrics: dict[str, float]
    """Name of the metric -> value, e.g. acc, acc_norm."""
    standard_errors: dict[str, float]
    num_samples: int
    num_fewshot: int
    version: str


class Evaluation(Frozen):
    """The result of `structprune eval`. `schema_version` rises when a field changes its meaning or goes away."""

    kind: Literal["evaluation"] = "evaluation"
    schema_version: int = MEASURED_VERSION
    model: str
    against: str | None
    device: str
    dtype: str
    streamed: bool
    """One block in memory at a time, instead of the whole model."""
    planned_peak_bytes: int | None
    """Planned peak of a streamed evaluation."""
    measured_peak_bytes: int
    """Peak of this process above its size with the libraries loaded; device memory is not in it."""
    texts: list[TextResult]
    tasks: list[TaskResult]
    task_limit: int | None
    """Only the first so many samples of each task."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return self.model_dump(mode="json")


class Rate(Frozen):
    """Tokens per second over several repeats."""

    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""


class SpeedPoint(Frozen):
    """One model at one batch size and prompt length."""

    batch: int
    prompt_tokens: int
    decode_tokens: int
    prefill: Rate
    decode: Rate
    peak_bytes: int
    """Weights, and what a run of this shape added at its peak."""
    prefill_ratio: float | None
    """Median of the ratios to the other model's speed in the same repeat; None for that model, or without one."""
    decode_ratio: float | None


class BenchedModel(Frozen):
    """One model's size and speeds."""

    model: str
    parameters: int
    file_bytes: int
    weight_bytes: int
    """Bytes of the weights in memory, in the dtype of the forward passes."""
    points: list[SpeedPoint]


class Bench(Frozen):
    """The result of `structprune bench`; the model first, then the one it is compared with, then others."""

    kind: Literal["bench"] = "bench"
    schema_version: int = MEASURED_VERSION
    device: str
    dtype: str
    machine: str
    repeats: int
    models: list[BenchedModel]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return self.model_dump(mode="json")
