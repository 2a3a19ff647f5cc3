"""Perplexity over consecutive windows of a text, and how far a model's predictions are from another's.

The checkpoint is loaded by stock transformers. Shape suffixes: N windows, B windows of one batch, S positions,
D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures.head import output_head
from structprune.architectures.tokenizer import TextEncoder
from structprune.calibration.context import consecutive_windows
from structprune.errors import InputError, NumericalError

# Logits of this many positions at a time: the vocabulary is wider than everything else in the model.
_LOGIT_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityResult:
    """exp of the mean negative log-likelihood, and over what."""

    perplexity: float
    mean_nll: float
    seq_len: int
    stride: int
    num_windows: int
    num_predicted_tokens: int
    text: str
    kl_to_reference: float | None = None
    """Mean over the predicted tokens of KL(reference || model), in nats; None without a reference."""
    top1_agreement: float | None = None
    """Share of the positions where both models' likeliest token is the same; None without a reference."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The predictions to compare with, as last hidden states: the logits of a text would take a hundred times more."""

    hidden_NSD: Tensor
    """Positions 0..S-2 of every window, on the host, in the model's dtype."""
    head: nn.Module
    """Hidden states -> logits."""


def text_windows(model: Any, encoder: TextEncoder, text: str, name: str, seq_len: int, num: int | None) -> Tensor:
    """The text's first `num` windows (N, S). Raises InputError if it is too short, or the windows too long."""
    limit = model.config.max_position_embeddings
    if seq_len > limit:
        raise InputError("--seq-len is longer than the model's positions", got=seq_len, wanted=f"at most {limit}")
    return consecutive_windows(encoder.encode(text), seq_len, "text", name)[:num]


@torch.no_grad()
def make_reference(model: Any, windows_NS: Tensor) -> Reference:
    """What `model` predicts on these windows."""
    hidden = [_hidden_SD(model, windows_NS[index : index + 1]).cpu() for index in range(len(windows_NS))]
    return Reference(hidden_NSD=torch.stack(hidden), head=output_head(model))


@torch.no_grad()
def perplexity(
    model: Any, windows_NS: Tensor, text_name: str, *, reference: Reference | None = None
) -> PerplexityResult:
    """Non-overlapping windows, no special tokens; seq_len - 1 predictions each. Measured against `reference` too.

    Raises NumericalError if the logits are not finite.
    """
    num_windows, seq_len = windows_NS.shape
    head = output_head(model)
    total, divergence, agreed = 0.0, 0.0, 0
    for index in range(num_windows):
        hidden_SD = _hidden_SD(model, windows_NS[index : index + 1])
        labels_S = windows_NS[index, 1:].to(model.device)
        for start in range(0, seq_len - 1, _LOGIT_TOKENS):
            part = slice(start, start + _LOGIT_TOKENS)
            logits_SV = head(hidden_SD[part]).float()
            total += float(nn.functional.cross_entropy(logits_SV, labels_S[part], reduction="sum"))
            if reference is not None:
                wanted_SV = reference.head(reference.hidden_NSD[index, part].to(model.device)).float()
                agreed += int((wanted_SV.argmax(dim=-1) == logits_SV.argmax(dim=-1)).sum())
                divergence += _divergence(wanted_SV, logits_SV)
    predicted = num_windows * (seq_len - 1)
    # Past 700 nats per token the exponential overflows: no model, however bad, is there by pruning.
    if not total / predicted < 700:
        raise NumericalError(
            "the model's logits are NaN, infinite or absurdly large",
            where=text_name,
            do="use --dtype float32; if it stays, the checkpoint is damaged",
        )
    mean = total / predicted
    return PerplexityResult(
        perplexity=math.exp(mean),
        mean_nll=mean,
        seq_len=seq_len,
        stride=seq_len,
        num_windows=num_windows,
        num_predicted_tokens=predicted,
        text=text_name,
        kl_to_reference=None if reference is None else divergence / predicted,
        top1_agreement=None if reference is None else agreed / predicted,
    )


def _hidden_SD(model: Any, ids_1S: Tensor) -> Tensor:
    """Last hidden states of one window, without the last position, whose prediction lies outside."""
    return model.base_model(input_ids=ids_1S.to(model.device), use_cache=False).last_hidden_state[0, :-1]


def _divergence(wanted_SV: Tensor, logits_SV: Tensor) -> float:
    """Sum over the positions of KL(softmax(wanted) || softmax(logits)), in nats; both are overwritten."""
    wanted_SV -= wanted_SV.logsumexp(dim=-1, keepdim=True)
    logits_SV -= logits_SV.logsumexp(dim=-1, keepdim=True)
    return float(nn.functional.kl_div(logits_SV, wanted_SV, reduction="sum", log_target=True))
