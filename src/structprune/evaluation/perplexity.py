"""Perplexity over consecutive windows of a text, with the checkpoint loaded by stock transformers.

Shape suffixes: N windows, B windows of one batch, S positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: Any, encoder: TextEncoder, text: str, text_name: str, *, seq_len: int, max_windows: int | None = None
) -> PerplexityResult:
    """Non-overlapping windows of `seq_len` tokens, no special tokens, tail dropped; seq_len - 1 predictions each.

    Raises InputError if the text is shorter than one window or the window longer than the model's positions,
    NumericalError if the logits are not finite.
    """
    limit = model.config.max_position_embeddings
    if seq_len > limit:
        raise InputError("--seq-len is longer than the model's positions", got=seq_len, wanted=f"at most {limit}")
    windows_NS = consecutive_windows(encoder.encode(text), seq_len, "text", text_name)[:max_windows]
    num_windows = len(windows_NS)
    total = 0.0
    for index in range(num_windows):
        ids_BS = windows_NS[index : index + 1].to(model.device)
        base = model.base_model(input_ids=ids_BS, use_cache=False)
        hidden_SD = base.last_hidden_state[0, :-1]
        labels_S = ids_BS[0, 1:]
        for start in range(0, seq_len - 1, _LOGIT_TOKENS):
            logits_SV = model.get_output_embeddings()(hidden_SD[start : start + _LOGIT_TOKENS]).float()
            total += float(
                nn.functional.cross_entropy(logits_SV, labels_S[start : start + _LOGIT_TOKENS], reduction="sum")
            )
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
    )
