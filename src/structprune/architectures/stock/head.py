"""Head of a model, from hidden states to logits: the output projection, and what some families do to its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprune.architectures.family import Family


class _SoftCap(nn.Module):
    """x -> c tanh(x / c)."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        return torch.tanh(logits / self.cap) * self.cap


class _Multiplied(nn.Module):
    """x -> c x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.factor


class _Divided(nn.Module):
    """x -> x / c."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, logits: Tensor) -> Tensor:
        return logits / self.divisor


LOGIT_ENTRIES: Mapping[str, Callable[[float], nn.Module]] = {
    "final_logit_softcapping": _SoftCap,
    "logit_scale": _Multiplied,
    "lm_head_multiplier": _Multiplied,
    "logits_scaling": _Divided,
}
"""Config entry that changes the logits -> what it does to them."""


def with_entries(projection: nn.Module, family: Family, config: Any) -> nn.Module:
    """Append what the family's entries in the config do to the output of `projection`."""
    values = [(name, getattr(config, name)) for name in family.logit_entries]
    changes = [LOGIT_ENTRIES[name](value) for name, value in values if value is not None]
    return nn.Sequential(projection, *changes) if changes else projection


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadParts:
    """A head, part by part: what it does one after the other."""

    norm: nn.Module
    """The final norm, or what returns its input."""
    projection: nn.Linear
    changes: nn.Sequential
    """What some families do to the logits, each by itself."""


def head_parts(head: nn.Module) -> HeadParts:
    """Take a head apart that `StockModel.head` has built."""
    assert isinstance(head, nn.Sequential)
    *norms, last = head
    projection, *changes = last if isinstance(last, nn.Sequential) else [last]
    assert isinstance(projection, nn.Linear)
    return HeadParts(norm=nn.Sequential(*norms), projection=projection, changes=nn.Sequential(*changes))
