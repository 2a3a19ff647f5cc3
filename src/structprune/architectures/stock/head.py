"""Head of a model, from hidden states to logits: the output projection, and the cap that some families put on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures import FAMILIES
from structprune.architectures.family import Family


class _SoftCap(nn.Module):
    """x -> c tanh(x / c)."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        return torch.tanh(logits / self.cap) * self.cap


def capped(projection: nn.Module, family: Family, config: Any) -> nn.Module:
    """Append the cap to `projection`, if the family's config has one."""
    cap = None if family.logit_cap_field is None else getattr(config, family.logit_cap_field)
    return projection if cap is None else nn.Sequential(projection, _SoftCap(cap))


def output_head(model: Any) -> nn.Module:
    """Return what a loaded causal model does to its last hidden states."""
    projection: nn.Module = model.get_output_embeddings()
    if model.config.model_type not in FAMILIES:
        return projection
    return capped(projection, FAMILIES.get(model.config.model_type), model.config)
