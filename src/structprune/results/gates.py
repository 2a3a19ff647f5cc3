"""What is reported of gates that learned which units stay."""

from __future__ import annotations

from structprune.results.frozen import Frozen
from structprune.results.texts import TextDistance, text_figures


class GatedSublayer(Frozen):
    """What gates changed in one sublayer."""

    block: int
    kind: str
    num_free: int
    """Units near the threshold, which could change sides."""
    kept_before: int
    kept_after: int
    came: int
    """Units that stay now and would have gone."""


class GatesReport(Frozen):
    """What was learned about which units stay, before any block was cut."""

    learner: str
    steps: int
    num_windows: int
    """Calibration windows that were learned from."""
    losses: list[float]
    """Mean loss per token of each step's window, in nats, with the gates of that step: the KL divergence from the dense
    model, or that of the text's next tokens."""
    texts: list[TextDistance]
    """Each text, on those of its windows that no gate learned from."""
    sublayers: list[GatedSublayer]
    accepted: bool
    """Whether every text came nearer to the dense model; otherwise the method chose the units as it does without."""
    seconds: float

    @property
    def num_changed(self) -> int:
        """How many units came, in all."""
        return sum(sublayer.came for sublayer in self.sublayers)

    @property
    def text_figures(self) -> str:
        """Say for every text how far both choices are from the dense model."""
        return text_figures(self.texts)

    @property
    def outcome(self) -> str:
        """Say whether the learned choice counts."""
        if not self.accepted:
            return "not every text came nearer to the dense model, so the units were chosen as without gates"
        blocks = len({sublayer.block for sublayer in self.sublayers if sublayer.came})
        return f"{self.num_changed:,} units of {blocks} blocks changed places"
