"""Reports of texts: what was read of them, and how well the dense and the pruned model predict them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field

from structprune.results.frozen import Frozen


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


class _OneText(Frozen):
    name: str
    num_windows: int

    @property
    def label(self) -> str:
        """The name without its folder, for what is made to be published."""
        return Path(self.name).name


class HeldOutText(_OneText, Perplexities):
    """What the result is worth on the held-out windows of one of several texts."""


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


class TextDistance(_OneText):
    """How far two models are from the dense one on windows of one text that neither was chosen by."""

    before: float
    """Mean KL divergence per token of the choice at the start, in nats."""
    after: float
    """The same of what was found."""


def text_figures(texts: Iterable[TextDistance]) -> str:
    """Say for every text how far both choices are from the dense model."""
    return ", ".join(f"{text.label} {text.before:.4f} -> {text.after:.4f}" for text in texts)
