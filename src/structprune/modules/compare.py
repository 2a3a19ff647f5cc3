"""Whether two modules return the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from structprune.tracing.replay import TOLERANCE


def tensors_of(output: Any) -> list[Tensor]:
    """List the tensors that a module returns, in order."""
    return [each for each in pytree.tree_leaves(output) if isinstance(each, Tensor)]


def are_close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether as many tensors of the same shapes differ by no more than the tracer's tolerance."""
    return len(found) == len(wanted) and all(map(_is_close, found, wanted))


def _is_close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    if wanted.numel() == 0:
        return True
    largest = wanted.abs().max().clamp_min(torch.finfo(wanted.dtype).tiny)
    # Not `>`: what is not a number is no equality.
    return bool((found - wanted).abs().max() <= TOLERANCE.get(wanted.dtype, 3e-2) * largest)
