"""Which calibration windows a search fits on, which it draws from for every round, and which it is judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from structprune.allocation.proposers import Rung
from structprune.calibration.context import CalibrationWindows
from structprune.engine.planning.searching import window_shares, windows_per_text


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchWindows:
    """Numbers of the run's windows, of each text; no window has two parts."""

    fitted: tuple[int, ...]
    """Windows that consumers are solved on, of all texts, ascending."""
    measured: tuple[tuple[int, ...], ...]
    """Text -> windows that every round draws some of."""
    judged: tuple[tuple[int, ...], ...]
    """Text -> windows that the final judgement alone sees."""

    @property
    def unfitted(self) -> tuple[int, ...]:
        """All others than the fitted ones, ascending."""
        return tuple(sorted(number for text in (*self.measured, *self.judged) for number in text))

    def drawn(self, rung: Rung, seed: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Draw windows for one round, as many of each text; text -> numbers."""
        random = np.random.default_rng(seed)
        wanted = windows_per_text(rung, len(self.measured))
        return tuple(tuple(sorted(random.permutation(np.array(text))[:wanted].tolist())) for text in self.measured)


def shared_out(windows: CalibrationWindows, backward: int) -> SearchWindows:
    """Share out the run's windows; `backward` are those of the sensitivity pass.

    Raises InputError for a text with too few.
    """
    num_windows, seq_len = windows.ids_NS.shape
    texts = [text.windows for text in windows.texts] or [tuple(range(num_windows))]
    fitted, measured, judged = list[int](), list[tuple[int, ...]](), list[tuple[int, ...]]()
    for numbers in texts:
        share = window_shares(len(numbers), backward, len(texts), seq_len)
        fitted += numbers[: share.fitted]
        measured.append(tuple(numbers[share.fitted : len(numbers) - share.judged]))
        judged.append(tuple(numbers[len(numbers) - share.judged :]))
    return SearchWindows(fitted=tuple(sorted(fitted)), measured=tuple(measured), judged=tuple(judged))
