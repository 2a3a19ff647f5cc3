"""The linear maps of a loaded model's blocks, however the stock code stores their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMaps:
    """Module names from the model's root."""

    names: tuple[str, ...]
    transposed: bool
    """Whether weights are stored as (inputs, outputs)."""


def linear_maps(model: Any, blocks_module: str) -> LinearMaps:
    """Name the linear maps that are modules of their own; experts that are held as one tensor are left out."""
    found: dict[str, nn.Module] = {
        f"{blocks_module}.{name}": module
        for name, module in model.get_submodule(blocks_module).named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    return LinearMaps(names=tuple(found), transposed=any(isinstance(module, Conv1D) for module in found.values()))
