"""What a search over widths states of itself, as part of a run's report."""

from __future__ import annotations

from pydantic import Field

from structprune.results.frozen import Frozen
from structprune.results.texts import TextDistance, text_figures


class SearchGeneration(Frozen):
    """What one generation of a search over widths has measured."""

    num_choices: int
    """Choices that were proposed."""
    loss: float
    """KL divergence from the dense model of the best one so far, on this generation's windows, in nats per token."""
    start_loss: float
    """The same of the choice that the search started from, on the same windows."""
    seconds: float

    @property
    def change(self) -> float:
        """How much less the best one so far loses than the start, as a share of that: negative where it is better."""
        return self.loss / self.start_loss - 1 if self.start_loss else 0.0


class AnchorReport(Frozen):
    """What the dense model loses with one sublayer changed."""

    block: int
    kind: str
    kept_units: int
    predicted: float
    """Sum of what its removals were predicted to cost, in nats per token."""
    measured: float
    """KL divergence from the dense model, in nats per token."""


class SearchReport(Frozen):
    """What a search over widths has found, on windows that none of its generations saw."""

    name: str
    generations: list[SearchGeneration]
    anchors: list[AnchorReport] = Field(default_factory=list[AnchorReport])
    """What single sublayers lose; empty where predicted losses were not corrected."""
    num_measured: int
    """Choices that were measured, each time that one was."""
    finalist_losses: list[float]
    """KL divergence from the dense model of the choices that were compared with the start; where single sublayers were
    measured, the exact choice for the corrected losses is the last one."""
    num_windows: int
    seq_len: int
    start_loss: float
    """KL divergence of the start from the dense model on these windows, in nats per token; with `--objective worst`
    that of the text where it is largest."""
    found_loss: float
    """The same of the best finalist."""
    gain: float
    """How much less that one loses."""
    standard_error: float | None
    """Standard error of the gain, from differences window by window; None: no other widths, or a text's only window."""
    clear: bool = False
    """Whether the gain is above two standard errors; False where it was not taken in reports of earlier versions."""
    texts: list[TextDistance] = Field(default_factory=list[TextDistance])
    """Each calibration text, on these windows; empty in reports of earlier versions."""
    taken: bool
    """Whether the gain is clear and, without `--objective worst`, no text is further from the dense model: otherwise
    the widths are those of the start."""
    num_masks: int
    """Draws of other units that were measured at the widths that were chosen."""
    masks_better: int
    """How many of these lose less than the method's own units."""
    masks_loss: float
    """KL divergence of them, in the mean."""
    start_widths: dict[str, list[int]]
    """Kind -> units of each block that the search started from."""
    found_widths: dict[str, list[int]]
    """The same of the best finalist."""
    seconds: float

    @property
    def line(self) -> str:
        """Say what the search gained, and what became of it."""
        took = f"({self.num_measured} measurements, {self.seconds / 60:.1f} minutes)"
        if not self.finalist_losses:
            return f"{self.name}: found no other widths {took}"
        error = "" if self.standard_error is None else f" +- {self.standard_error:.4f}"
        further = ", ".join(text.label for text in self.texts if text.after > text.before)
        against = f"further from it on {further}" if self.clear else "not two standard errors"
        verdict = "taken" if self.taken else f"{against}, so the start stays"
        figures = f" ({text_figures(self.texts)})" if len(self.texts) > 1 else ""
        return (
            f"{self.name}: KL from the dense model {self.start_loss:.4f} -> {self.found_loss:.4f} nats per token on "
            f"{self.num_windows} windows that it had not seen, {self.gain:.4f}{error} less{figures}: {verdict}; of "
            f"{self.num_masks} draws of other units at these widths {self.masks_better} lost less {took}"
        )
