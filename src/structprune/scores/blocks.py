"""What a run of whole blocks does to the residual stream.

Shape suffixes: T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def angular_distance(before_TD: Tensor, after_TD: Tensor) -> Tensor:
    """Return the angle between each token's two hidden states over pi, in [0, 1], float32 (T,).

    arccos(a.b / |a||b|) / pi (arXiv 2403.17887), computed as 2 atan2(|u - v|, |u + v|) of the unit vectors u and v: the
    arc cosine loses half of its digits where the two are nearly the same, which is where the blocks are that can be
    removed. A vector of zeros is at distance 0 from another one and at 1/2 from the rest.
    """
    u_TD = torch.nn.functional.normalize(before_TD.float(), dim=-1)
    v_TD = torch.nn.functional.normalize(after_TD.float(), dim=-1)
    angle_T = 2 * torch.atan2((u_TD - v_TD).norm(dim=-1), (u_TD + v_TD).norm(dim=-1))
    return angle_T / torch.pi
