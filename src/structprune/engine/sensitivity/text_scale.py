"""Gradients of several calibration texts at one scale, so that the noisiest text does not decide alone.

A sensitivity E[g g^T] is a sum over the windows of all texts, in which a text whose loss has larger gradients counts
more. Divided by its trace each text counts alike. The trace is taken where the gradient enters the block: behind an MLP
that is added to the stream as it is this is the trace of its own sensitivity, elsewhere that of a place nearby. At the
end of the model alone it would not do: on five domains traces that are made equal there differ by a quarter ten blocks
further in (docs/log/2026-11-29-objective.md).
"""

from __future__ import annotations

import math

import torch

from structprune.calibration.store import HiddenStore
from structprune.engine.run.context import RunContext
from structprune.linalg.gram_products import energy
from structprune.recipe.units import ResolvedUnits


def window_factors(context: RunContext, gradient: HiddenStore) -> list[float]:
    """Return what the gradients of each of this rank's windows are multiplied by, 1 for all where they stay as given.

    With them those of every text have one mean square, that of all; windows of the backward pass only. All ranks call
    it.
    """
    ranks = context.ranks
    factors = [1.0] * gradient.shape[0]
    if context.settings(ResolvedUnits).sensitivity_scale == "given":
        return factors
    of_texts = [[n for n in text.windows if n < context.num_backward] for text in context.windows.texts]
    own = [[w for n in numbers for w in range(*ranks.local_range(n, n + 1))] for numbers in of_texts]
    sums = [sum(float(energy(gradient.read(w, w + 1))) for w in windows) for windows in own]
    energies = ranks.all_reduce(torch.tensor(sums, dtype=torch.float64))
    wanted = float(energies.sum()) / max(1, sum(map(len, of_texts)))
    for windows, numbers, found in zip(own, of_texts, energies.tolist(), strict=True):
        for window in windows:
            factors[window] = math.sqrt(wanted * len(numbers) / found) if found > 0 else 1.0
    return factors
