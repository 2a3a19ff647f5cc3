"""What the head makes of the last hidden states: the calibration text's perplexities, and logits to compare later.

Shape suffixes: N windows, S positions, D hidden size, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from structprune.architectures.stock.model import StockModel
from structprune.engine.planning.shapes import LOGIT_TOKENS
from structprune.engine.run.context import RunContext
from structprune.engine.run.reload_check import Probe, take_probe
from structprune.engine.streaming.losses import summed_loss
from structprune.errors import NOT_FINITE_ADVICE, NumericalError


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalMetrics:
    """What the head makes of the final hidden states of the first `num_probe` calibration windows."""

    dense_perplexity: float
    pruned_perplexity: float
    probe: Probe | None
    """None if the recipe wants no reload check."""


@torch.no_grad()
def final_metrics(
    context: RunContext, dense_NSD: Tensor, pruned_NSD: Tensor, pruned: StockModel | None = None
) -> FinalMetrics:
    """Compute the calibration text's perplexities, dense and pruned, and the logits for the reload check.

    The last hidden states are those of the first `num_probe` windows; `pruned` is the pruned model where its head is
    another one than the source's. Raises NumericalError for outputs that are not finite.
    """
    head = context.stock.load_head(context.device, context.dtype)
    labels_T = context.windows.ids_NS[: context.num_probe, 1:].reshape(-1).to(context.device)
    result: list[float] = []
    for hidden_NSD in (dense_NSD, pruned_NSD):
        if result and pruned is not None:
            del head
            head = pruned.load_head(context.device, context.dtype)
        hidden_TD = hidden_NSD[:, :-1].reshape(-1, hidden_NSD.shape[-1]).to(context.device)
        mean = summed_loss(head, hidden_TD, labels_T) / len(hidden_TD)
        if not mean < 700:
            raise NumericalError(
                "the model's output on the calibration text is NaN, infinite or absurdly large",
                where="dense model" if not result else "pruned model",
                do=NOT_FINITE_ADVICE,
            )
        result.append(math.exp(mean))
    first_SD = pruned_NSD[0, :LOGIT_TOKENS].to(context.device)
    return FinalMetrics(
        dense_perplexity=result[0],
        pruned_perplexity=result[1],
        probe=take_probe(context, context.windows.ids_NS[0], head(first_SD)),
    )
