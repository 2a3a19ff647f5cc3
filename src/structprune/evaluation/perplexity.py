"""Perplexity over consecutive windows of a text, and how far a model's predictions are from another's.

The checkpoint is loaded by stock transformers. Shape suffixes: N windows, B windows of one batch, S positions,
D hidden size, V vocabulary, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures.sources.tokenizer import TextEncoder
from structprune.architectures.stock.loading import backbone, output_head
from structprune.calibration.context import WindowStart, consecutive_windows
from structprune.errors import NOT_FINITE_ADVICE, InputError, NumericalError

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
    start: str = ""
    """The start token that every window begins with; empty: there is none."""
    kl_to_reference: float | None = None
    """Mean over the predicted tokens of KL(reference || model), in nats; None without a reference."""
    top1_agreement: float | None = None
    """Share of the positions where both models' likeliest token is the same; None without a reference."""
    reference_perplexity: float | None = None
    """The reference's own, over the same tokens."""
    num_bytes: int | None = None
    """Bytes of the text that the predicted tokens write."""
    bits_per_byte: float | None = None
    """What it takes to tell a byte of the text: comparable between tokenizers, as perplexity is not."""

    def over_text(self, num_bytes: int) -> PerplexityResult:
        """Return the result with its figures per byte of text; without them where the tokens write none."""
        if not num_bytes:
            return self
        bits = self.mean_nll * self.num_predicted_tokens / math.log(2)
        return replace(self, num_bytes=num_bytes, bits_per_byte=bits / num_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionSums:
    """Sums over predicted tokens; those of two parts of a text add up."""

    num_tokens: int = 0
    nll: float = 0.0
    divergence: float = 0.0
    num_agreed: int = 0
    reference_nll: float = 0.0

    def __add__(self, other: PredictionSums) -> PredictionSums:
        return PredictionSums(
            num_tokens=self.num_tokens + other.num_tokens,
            nll=self.nll + other.nll,
            divergence=self.divergence + other.divergence,
            num_agreed=self.num_agreed + other.num_agreed,
            reference_nll=self.reference_nll + other.reference_nll,
        )

    def result(self, text_name: str, seq_len: int, num_windows: int, *, compared: bool) -> PerplexityResult:
        """Compute the means. Raises NumericalError if the logits were not finite."""
        # Past 700 nats per token the exponential overflows: no model, however bad, is there by pruning.
        if not (self.nll / self.num_tokens < 700 and self.reference_nll / self.num_tokens < 700):
            raise NumericalError(
                "the model's logits are NaN, infinite or absurdly large",
                where=text_name,
                do=NOT_FINITE_ADVICE,
            )
        mean = self.nll / self.num_tokens
        return PerplexityResult(
            perplexity=math.exp(mean),
            mean_nll=mean,
            seq_len=seq_len,
            stride=seq_len,
            num_windows=num_windows,
            num_predicted_tokens=self.num_tokens,
            text=text_name,
            kl_to_reference=self.divergence / self.num_tokens if compared else None,
            top1_agreement=self.num_agreed / self.num_tokens if compared else None,
            reference_perplexity=math.exp(self.reference_nll / self.num_tokens) if compared else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The predictions to compare with, as last hidden states: the logits of a text would take a hundred times more."""

    hidden_NSD: Tensor
    """Positions 0..S-2 of every window, on the host, in the model's dtype."""
    head: nn.Module
    """Hidden states -> logits."""


def text_windows(
    max_positions: int,
    encoder: TextEncoder,
    text: str,
    name: str,
    seq_len: int,
    num: int | None,
    start: WindowStart,
) -> Tensor:
    """Return the text's first `num` windows (N, S), each behind `start`.

    Raises InputError if the text is too short, or the windows too long.
    """
    if seq_len > max_positions:
        raise InputError(
            "--seq-len is longer than the model's positions", got=seq_len, wanted=f"at most {max_positions}"
        )
    ids = start.stripped(encoder.encode(text))
    return start.before(consecutive_windows(ids, start.room(seq_len), "text", name)[:num])


def text_bytes(encoder: TextEncoder, windows_NS: Tensor) -> int:
    """Count the bytes of the text that the predicted tokens of these windows write."""
    return sum(len(encoder.decode(ids_S[1:]).encode()) for ids_S in windows_NS)


@torch.no_grad()
def make_reference(model: Any, windows_NS: Tensor) -> Reference:
    """Record what `model` predicts on these windows."""
    hidden = [_hidden_SD(model, windows_NS[index : index + 1]).cpu() for index in range(len(windows_NS))]
    return Reference(hidden_NSD=torch.stack(hidden), head=output_head(model))


@torch.no_grad()
def perplexity(
    model: Any, windows_NS: Tensor, text_name: str, *, reference: Reference | None = None
) -> PerplexityResult:
    """Measure the perplexity over non-overlapping windows, and the distance to `reference` if there is one.

    No special tokens; seq_len - 1 predictions in each window. Raises NumericalError if the logits are not finite.
    """
    num_windows, seq_len = windows_NS.shape
    head = output_head(model)
    sums = PredictionSums()
    for index in range(num_windows):
        hidden_SD = _hidden_SD(model, windows_NS[index : index + 1])
        labels_S = windows_NS[index, 1:].to(model.device)
        for start in range(0, seq_len - 1, _LOGIT_TOKENS):
            part = slice(start, start + _LOGIT_TOKENS)
            wanted_TV = None
            if reference is not None:
                wanted_TV = reference.head(reference.hidden_NSD[index, part].to(model.device)).float()
            sums += score_predictions(head(hidden_SD[part]).float(), labels_S[part], wanted_TV)
    return sums.result(text_name, seq_len, num_windows, compared=reference is not None)


def score_predictions(logits_TV: Tensor, labels_T: Tensor, wanted_TV: Tensor | None) -> PredictionSums:
    """Sum the losses of some positions' float32 logits, and compare with a reference's; both are overwritten."""
    nll = float(nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum"))
    if wanted_TV is None:
        return PredictionSums(num_tokens=len(labels_T), nll=nll)
    reference_nll = float(nn.functional.cross_entropy(wanted_TV, labels_T, reduction="sum"))
    agreed = int((wanted_TV.argmax(dim=-1) == logits_TV.argmax(dim=-1)).sum())
    wanted_TV -= wanted_TV.logsumexp(dim=-1, keepdim=True)
    logits_TV -= logits_TV.logsumexp(dim=-1, keepdim=True)
    divergence = nn.functional.kl_div(logits_TV, wanted_TV, reduction="sum", log_target=True)
    return PredictionSums(
        num_tokens=len(labels_T),
        nll=nll,
        divergence=float(divergence),
        num_agreed=agreed,
        reference_nll=reference_nll,
    )


def _hidden_SD(model: Any, ids_1S: Tensor) -> Tensor:
    """Compute the last hidden states of one window, without the last position, whose prediction lies outside."""
    return backbone(model)(input_ids=ids_1S.to(model.device), use_cache=False).last_hidden_state[0, :-1]
