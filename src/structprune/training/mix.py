"""Which windows a step learns from: all alike, or with more weight on the texts that are further from the teacher.

The weights are those of DRPruning (2411.14055): texts i with prior shares p and excess losses l get the shares q that
maximise sum q l over the distributions within a chi-square distance of p,

    sum_i p_i (q_i / p_i - 1)^2 / 2 <= radius,

which are q_i proportional to p_i max(l_i - eta, 0); eta is found by bisection. The excess loss of a text is the KL
divergence from the teacher on its held-out windows: what the student loses there beside the teacher. A reconstruction:
the authors' schedule of reference losses and priors is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel

from structprune.training.texts import Texts


class MixState(BaseModel):
    """What the order of the next windows depends on beside step and seed."""

    shares: list[float] = []
    """Shares of the texts; empty: all windows alike."""
    drawn: list[int] = []
    """Windows drawn so far, per text; empty where all are alike."""


def robust_shares(prior: Sequence[float], excess: Sequence[float], radius: float) -> list[float]:
    """Compute the shares q of the texts, by bisection for eta; `prior` sums to 1 and is positive.

    Equal losses leave the prior as it is. Where the ball holds the distribution on the largest loss alone, that is it.
    """
    p = torch.tensor(prior, dtype=torch.float64)
    loss = torch.tensor(excess, dtype=torch.float64)
    top, bottom = float(loss.max()), float(loss.min())
    spread = top - bottom
    if spread <= 1e-12 * max(1.0, abs(top)):
        return [float(value) for value in p]

    def shares(eta: float) -> torch.Tensor:
        weight = p * (loss - eta).clamp_min(0)
        return weight / weight.sum()

    def distance(eta: float) -> float:
        return float((p * (shares(eta) / p - 1).square()).sum()) / 2

    # The distance rises with eta: at minus infinity the shares are the prior, near the top all is on the largest loss.
    low, high = bottom - spread, top - 1e-9 * spread
    if distance(high) <= radius:
        return [float(value) for value in shares(high)]
    while distance(low) > radius:
        low -= top - low
    for _ in range(200):
        middle = (low + high) / 2
        if distance(middle) > radius:
            high = middle
        else:
            low = middle
    return [float(value) for value in shares(low)]


class Mix:
    """The order of the windows."""

    def __init__(self, texts: Texts, *, robust: bool, radius: float, seed: int) -> None:
        self._texts = texts
        self._robust = robust
        self._radius = radius
        self._seed = seed
        total = len(texts.all_train)
        self._prior = [len(part) / total for part in texts.train]

    def judged(self, state: MixState, by_text: Sequence[float]) -> MixState:
        """Return the state after the held-out windows were measured: KL divergence per text."""
        if not self._robust:
            return state
        shares = robust_shares(self._prior, by_text, self._radius)
        return MixState(shares=shares, drawn=state.drawn or [0] * len(shares))

    def drawn(self, state: MixState, windows: Sequence[int]) -> MixState:
        """Return the state after a step on these windows."""
        if not self._robust:
            return state
        counts = [
            count + sum(number in part for number in windows)
            for count, part in zip(state.drawn, self._texts.train, strict=True)
        ]
        return state.model_copy(update={"drawn": counts})

    def windows(self, state: MixState, step: int, batch: int) -> list[int]:
        """Draw the windows of step `step` (from 0), at most `batch`; alike, each comes once before any comes again."""
        if not self._robust:
            every = self._texts.all_train
            per_pass = -(-len(every) // batch)
            number, position = divmod(step, per_pass)
            return [every[i] for i in self._order(len(every), number, 0)[position * batch : (position + 1) * batch]]
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + step) * 2 + 1)
        chosen = torch.multinomial(
            torch.tensor(state.shares, dtype=torch.float64), batch, replacement=True, generator=generator
        )
        counts = list(state.drawn)
        result: list[int] = []
        for text in chosen.tolist():
            part = self._texts.train[text]
            number, position = divmod(counts[text], len(part))
            result.append(part[self._order(len(part), number, text + 1)[position]])
            counts[text] += 1
        return result

    def _order(self, length: int, number: int, text: int) -> list[int]:
        seed = ((self._seed * 1_000_003 + number) * 1_009 + text) * 2
        return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
