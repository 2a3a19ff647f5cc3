"""Channels that change groups so that N:M keeps more: the second stage of RIA's channel permutation.

Place after place of the groups, each group gives its channel there away, and all of them are handed out again so that
what the groups keep of the score is most: an assignment problem (Plug-and-Play, ICLR 2024). What is kept of a group's
row with another channel x is what its N - 1 largest others have and the larger of x and their N-th, so one maximum of
two numbers tells each pair.

Shape suffixes: G groups, M places, R rows that a channel has scores in, C channels of one place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structprune.linalg.assignment import best_assignment

# Groups that exchange channels among themselves: larger maps are cut, as in public code.
_MOST_GROUPS = 128


def assigned(score_UR: Tensor, order_U: Tensor, keep: int, of: int) -> Tensor:
    """Exchange channels of an order with these scores: what makes no whole group stays where it is."""
    whole = len(order_U) // of * of
    order_GM = order_U[:whole].view(-1, of).clone()
    # Every part gets groups from all over, as their order says nothing else.
    parts = max(1, -(-len(order_GM) // _MOST_GROUPS))
    for part in range(parts):
        order_GM[part::parts] = _exchanged(score_UR, order_GM[part::parts], keep)
    return torch.cat([order_GM.flatten(), order_U[whole:]])


def _exchanged(score_UR: Tensor, order_GM: Tensor, keep: int) -> Tensor:
    """Hand out the channels of each place in turn."""
    order_GM = order_GM.clone()
    for place in range(order_GM.shape[1]):
        own_CR = score_UR[order_GM[:, place]]
        # What groups keep is compared by the channel: what their others have of it is the same for all.
        kept_GC = torch.empty(len(order_GM), len(own_CR))
        for number, group_M in enumerate(order_GM):
            others = [other for other in range(len(group_M)) if other != place]
            least_R = score_UR[group_M[others]].sort(dim=0, descending=True).values[keep - 1]
            kept_GC[number] = torch.maximum(own_CR, least_R).sum(dim=1)
        order_GM[:, place] = order_GM[best_assignment(kept_GC), place]
    return order_GM
