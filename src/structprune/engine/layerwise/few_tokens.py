"""Experts of a mixture that are sent fewer tokens than their problem wants: pruned all the same, nearer to the weights.

How many tokens an expert gets is the router's decision, not the caller's. With few, the Gram says nothing of most
directions; with none, it says nothing at all.

Shape suffixes: I consumer inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structprune.rows import DiagonalRows
from structprune.types import LayerProblem, Moments, UnitGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTokens:
    """How many calibration tokens one expert was sent, and how many make its Gram full."""

    sent: int
    enough: int

    @classmethod
    def of(cls, group: UnitGroup, measured: Sequence[Moments], problem: LayerProblem) -> ExpertTokens | None:
        """Count those of `group`; None where it is no expert, or where nothing was counted."""
        if group.expert is None:
            return None
        enough = problem.weight_OI.shape[1]
        if problem.taylor is not None and not problem.taylor.first_U.any():
            # No window of the backward pass has a token for it.
            return cls(sent=0, enough=enough)
        return cls(sent=sum(moments.num_tokens for moments in measured), enough=enough) if measured else None


def with_missing_tokens(problem: LayerProblem) -> LayerProblem:
    """Make up for the tokens that are missing to a full Gram by tokens whose inputs are independent.

    One of them has equal inputs, of the mean energy e; in the others each input has the mean energy that it has in the
    T tokens that there are: G = sum x x^T becomes G + (I - T - 1) / T diag(G) + e 1. So the energies count as they were
    measured, and correlations the less the fewer tokens they come from. Without a token the Gram is the identity: the
    weights alone decide, and those that stay are not changed. Where windows are kept apart to choose the ridge and the
    expert's tokens are all on one side, nothing can be judged: the decision's ridge is taken.
    """
    fit, validation = problem.fit, problem.held_out
    # A text that sends it none says nothing of it.
    by_text = tuple(moments for moments in problem.held_out_by_text if moments.num_tokens)
    if validation is not None and not (fit.num_tokens and validation.num_tokens):
        fit, validation, by_text = (fit if fit.num_tokens else validation), None, ()
    parts = [part for part in (fit, validation) if part is not None]
    num_inputs, num_tokens = problem.weight_OI.shape[1], sum(part.num_tokens for part in parts)
    missing = num_inputs - num_tokens
    if missing > 0:
        energy_I = sum((part.gram_II.diagonal() for part in parts), torch.zeros(num_inputs, device=problem.device))
        fit = fit + Moments(
            gram_II=DiagonalRows(values_I=_missing_energy(energy_I / max(1, num_tokens), missing)),
            num_tokens=missing,
            sum_I=torch.zeros(num_inputs, dtype=torch.float64, device=problem.device),
        )
    return replace(problem, fit=fit, held_out=validation, held_out_by_text=by_text)


def _missing_energy(mean_I: Tensor, missing: int) -> Tensor:
    """Sum of x_j^2 over the missing tokens; `mean_I` is the mean over those that there are."""
    mean = float(mean_I.mean(dtype=torch.float64))
    if mean == 0:
        # Inputs that are zero at every token say as little as no token.
        return torch.full_like(mean_I, missing)
    return mean_I * (missing - 1) + mean


def token_statistics(counts: Sequence[ExpertTokens], num_tokens: int) -> dict[str, float]:
    """Count for the report of one block how many experts had none, how many too few, and the least that any had.

    Of `num_tokens` that passed the block. How many would do follows from the share of the expert that is used least.
    """
    if not counts:
        return {}
    least, enough = min(tokens.sent for tokens in counts), max(tokens.enough for tokens in counts)
    return {
        "experts_without_tokens": float(sum(tokens.sent == 0 for tokens in counts)),
        "experts_with_few_tokens": float(sum(0 < tokens.sent < tokens.enough for tokens in counts)),
        "least_expert_tokens": float(least),
        "enough_expert_tokens": float(enough),
        "tokens": float(num_tokens),
        "wanted_tokens": float(max(num_tokens, -(-num_tokens * enough // max(1, least)))),
    }
