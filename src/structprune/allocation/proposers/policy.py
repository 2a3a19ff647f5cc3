"""Policies over widths that learn from measured losses alone, by the score function (REINFORCE).

A policy gives every slot the mean of the share that it keeps; a child is drawn around the means and brought to the
budget. Children better than the mean of their generation pull the policy towards them. The fitness need not be
differentiable. `bypass` has a number for each slot: the policy gradient of Bypass Back-propagation (arXiv 2406.10576)
over slots in the place of single units, for which a gradient of a few losses is too noisy. `graph` computes the means
from what is known of the slots by graph attention between neighbours, as the abstract of arXiv 2509.10526 has it; no
code and no tables of that are public, so it is reconstructed from the abstract, with one layer and without a critic.

Shape suffixes: G slots, C children, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from structprune.allocation.menu import Budget, Choice, Slot
from structprune.allocation.proposers.levels import kept_shares, shifted
from structprune.allocation.proposers.proposer import Measured, Rung, Search, SearchOptions, winner

_DEVIATION = 0.06
"""Standard deviation of the shares that are drawn."""
_TRIES = 20
_MEAN_STEP = 0.02
"""Rate of Adam for means, as shares of a slot's units."""
_GRAPH_STEP = 0.005
_HIDDEN = 16
_REACH = 4
"""Slots that are this many places apart, in the order of the forward pass, see each other."""


class Means(nn.Module):
    """A number for each slot."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__()
        self.mean_G = nn.Parameter(torch.zeros(len(slots)))

    def forward(self) -> Tensor:
        """Return what each slot keeps beyond the share that it started from, (slots,)."""
        return self.mean_G


class GraphMeans(nn.Module):
    """One layer of graph attention over neighbouring slots (arXiv 1710.10903), then a number for each."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__()
        self.features_GF = slot_features(slots)
        place_G = torch.arange(len(slots))
        self._apart_GG = (place_G[:, None] - place_G[None, :]).abs() > _REACH
        self.project = nn.Linear(self.features_GF.shape[1], _HIDDEN, bias=False)
        self.ask = nn.Linear(_HIDDEN, 1, bias=False)
        self.answer = nn.Linear(_HIDDEN, 1, bias=False)
        self.out = nn.Linear(2 * _HIDDEN, 1)
        # The policy starts from the choice that it is given.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self) -> Tensor:
        """Return what each slot keeps beyond the share that it started from, (slots,)."""
        hidden = self.project(self.features_GF)
        scores = nn.functional.leaky_relu(self.ask(hidden) + self.answer(hidden).T, 0.2)
        seen = torch.softmax(scores.masked_fill(self._apart_GG, -math.inf), dim=1) @ hidden
        return self.out(torch.cat([torch.tanh(hidden), torch.tanh(seen)], dim=1))[:, 0]


def slot_features(slots: Sequence[Slot]) -> Tensor:
    """Describe each slot: depth, kind, share of all parameters, and predicted losses of two widths, (slots, features).

    Losses as standardised logarithms.
    """
    last, costs = max(1, *(slot.block for slot in slots)), [slot.variants[0].cost[0] for slot in slots]
    columns = [
        [slot.block / last for slot in slots],
        [float(slot.kind == "attention") for slot in slots],
        [cost / sum(costs) for cost in costs],
        *(
            _standardised([slot.variants[(len(slot.variants) - 1) * part // 4].price for slot in slots])
            for part in (2, 4)
        ),
    ]
    return torch.tensor(columns, dtype=torch.float32).T


def _standardised(prices: Sequence[float]) -> list[float]:
    logs = np.log(np.maximum(np.array(prices), 1e-12))
    return list((logs - logs.mean()) / max(1e-6, float(logs.std())))


class PolicySearch:
    """The search; `best` is the best choice of the last round of every generation."""

    def __init__(
        self,
        slots: Sequence[Slot],
        budget: Budget,
        start: Choice,
        options: SearchOptions,
        *,
        policy: Callable[[Sequence[Slot]], nn.Module],
        rate: float,
    ) -> None:
        self._slots, self._budget, self._options = slots, budget, options
        self._random = np.random.default_rng(options.seed)
        self._start_G, self._best, self._generation = kept_shares(slots, start), start, 0
        self._asked: dict[Choice, Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self._policy = policy(slots)
        self._optimizer = torch.optim.Adam(self._policy.parameters(), lr=rate)

    def ask(self) -> Sequence[Choice]:
        """Return choices that the policy draws; fewer than wanted where they repeat."""
        self._asked = {}
        if self._generation == self._options.generations:
            return []
        with torch.no_grad():
            mean_G = self._start_G + self._policy().numpy().astype(np.float64)
        for _ in range(_TRIES * self._options.children):
            if len(self._asked) == self._options.children:
                break
            choice = shifted(self._slots, mean_G + self._random.normal(0, _DEVIATION, len(mean_G)), self._budget)
            if choice is not None and choice != self._best and choice not in self._asked:
                self._asked[choice] = torch.tensor(kept_shares(self._slots, choice) - self._start_G)
        return list(self._asked)

    def tell(self, rounds: Sequence[Sequence[Measured]]) -> None:
        """Move the policy towards the better half of what it has drawn, measured by the first round."""
        drawn = [measured for measured in rounds[0] if measured.choice in self._asked]
        losses = np.array([measured.loss for measured in drawn])
        if len(drawn) > 1 and losses.std() > 0:
            advantage_C = torch.tensor((losses.mean() - losses) / losses.std())
            shares_CG = torch.stack([self._asked[measured.choice] for measured in drawn])
            self._optimizer.zero_grad()
            # The logarithm of a normal density, whose mean the policy gives; a common shift means nothing.
            distance_CG = shares_CG - self._policy().double()
            log_density_C = -distance_CG.square().sum(dim=1) / (2 * _DEVIATION**2)
            (-(advantage_C * log_density_C).mean()).backward()
            self._optimizer.step()
        self._best = winner(rounds)
        self._generation += 1

    def best(self) -> Choice:
        """Return the best choice by now."""
        return self._best


BYPASS = Search(
    title="Policy gradient over widths",
    paper="arXiv 2406.10576",
    provenance="reconstructed",
    propose=partial(PolicySearch, policy=Means, rate=_MEAN_STEP),
    generations=12,
    children=16,
    rungs=(Rung(windows=2), Rung(windows=8, choices=2)),
)
GRAPH = Search(
    title="Policy gradient with graph attention between sublayers",
    paper="arXiv 2509.10526",
    provenance="reconstructed",
    propose=partial(PolicySearch, policy=GraphMeans, rate=_GRAPH_STEP),
    generations=12,
    children=16,
    rungs=(Rung(windows=2), Rung(windows=8, choices=2)),
)
