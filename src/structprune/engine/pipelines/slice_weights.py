"""What a slicing run writes: the weights of a block, of the embedding and of the head in the bases of their positions.

Shape suffixes: D hidden size, K kept dimensions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from structprune.architectures.family import Stream
from structprune.architectures.modeling.sliced import SHORTCUTS
from structprune.engine.run.context import RunContext
from structprune.linalg.rotation import rotated, rows_per_chunk


def rotated_block(
    tensors: Mapping[str, Tensor], stream: Stream, bases: Sequence[Tensor], *, shortcuts: bool
) -> dict[str, Tensor]:
    """Rotate the block (relative names) between the positions of `bases`, one more than it has sublayers.

    A reader is W diag(norm weight) B sqrt(D / K), a writer B'^T W, the shortcut between them B'^T B; the norms' weights
    become ones. The root makes a norm that divides by the mean over K equal to one over D; it goes into the readers,
    because in a norm's weight bfloat16 would round it for all maps alike.
    """
    result = dict(tensors)
    for sublayer, basis_DK, next_DK in zip(stream.sublayers, bases[:-1], bases[1:], strict=True):
        norm = f"{sublayer.norm}.weight"
        scale_D = folded_scale(tensors[norm], basis_DK)
        for name in sublayer.readers:
            result[f"{name}.weight"] = rotated(tensors[f"{name}.weight"], basis_DK, 1, scale_D)
        for part in ("weight", "bias"):
            name = f"{sublayer.writer}.{part}"
            if name in tensors:
                result[name] = rotated(tensors[name], next_DK, 0)
        result[norm] = ones_like_norm(tensors[norm], basis_DK)
        if shortcuts:
            shortcut_KK = next_DK.T @ basis_DK
            like = tensors[f"{sublayer.writer}.weight"]
            result[f"{SHORTCUTS[sublayer.kind]}.weight"] = shortcut_KK.to(like.device, like.dtype).contiguous()
    return result


def rotated_embeddings(context: RunContext, basis_DK: Tensor) -> dict[str, Tensor]:
    """Compute E B of every embedding, read in row chunks."""
    return {name: _rotated_rows(context, name, basis_DK) for name in context.stock.embedding_tensors()}


def rotated_head(context: RunContext, basis_DK: Tensor) -> dict[str, Tensor]:
    """Rotate final norm and head: W diag(norm weight) B sqrt(D / K) of the tied embedding or head, in row chunks."""
    family = context.stock.family
    norm = f"{family.final_norm_module}.weight"
    weight_D = context.reader.read([norm])[norm]
    head_VK = _rotated_rows(context, context.stock.head_weight, basis_DK, folded_scale(weight_D, basis_DK))
    return {norm: ones_like_norm(weight_D, basis_DK), f"{family.head_module}.weight": head_VK}


def folded_scale(norm_weight_D: Tensor, basis_DK: Tensor) -> Tensor:
    """Compute what a map behind the norm takes over from it, per dimension before the rotation."""
    hidden, width = basis_DK.shape
    return norm_weight_D.to(basis_DK.device, torch.float64) * math.sqrt(hidden / width)


def ones_like_norm(norm_weight_D: Tensor, basis_DK: Tensor) -> Tensor:
    """Create the weight of a norm whose own has been folded away."""
    return norm_weight_D.new_ones(basis_DK.shape[1])


def _rotated_rows(context: RunContext, name: str, basis_DK: Tensor, scale_D: Tensor | None = None) -> Tensor:
    num_rows, hidden = context.reader.shapes[name]
    result_VK = torch.empty(num_rows, basis_DK.shape[1], dtype=context.reader.dtypes[name])
    for start, rows_VD in context.reader.read_rows(name, rows_per_chunk(hidden)):
        result_VK[start : start + len(rows_VD)] = rotated(rows_VD, basis_DK, 1, scale_D)
    return result_VK
