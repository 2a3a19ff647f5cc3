"""The assignment of persons to objects of most value, by an auction.

Whoever has nothing bids for the object that is worth most to him beyond its price: so much that the next one would be
worth as much, and a little more. The last bids add a millionth of the values' range over all persons, so the total is
that near to the best one (Bertsekas, Network Optimization, 1998, chapter 7); they begin larger, which ends sooner.

Shape suffixes: N persons, objects, K persons without an object.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEAR, _FINER = 1e-6, 5.0


def best_assignment(value_NN: Tensor) -> Tensor:
    """Find the object of every person so that the sum of their values is most: (N,), each object once."""
    count = len(value_NN)
    value_NN = value_NN.to(torch.float64)
    span = float(value_NN.max() - value_NN.min()) if count else 0.0
    if count < 2 or span == 0:
        return torch.arange(count)
    price_N, finest = torch.zeros(count, dtype=torch.float64), _NEAR * span / count
    step = span / 4
    while True:
        step = max(step, finest)
        object_N = _auction(value_NN, price_N, step)
        if step == finest:
            return object_N
        step /= _FINER


def _auction(value_NN: Tensor, price_N: Tensor, step: float) -> Tensor:
    """Assign every object to who bids most, with prices from those given on, which are raised in place."""
    count = len(value_NN)
    object_N, owner_N = torch.full((count,), -1), torch.full((count,), -1)
    while len(bidders_K := (object_N < 0).nonzero().flatten()):
        worth_KN = value_NN[bidders_K] - price_N
        two_K2 = worth_KN.topk(2, dim=1)
        wanted_K = two_K2.indices[:, 0]
        bid_K = price_N[wanted_K] + two_K2.values[:, 0] - two_K2.values[:, 1] + step
        price_N.scatter_reduce_(0, wanted_K, bid_K, "amax")
        # Of equal bids for one object the first counts.
        highest_K = (bid_K == price_N[wanted_K]).nonzero().flatten().flip(0)
        winner_N = torch.full((count,), -1)
        winner_N[wanted_K[highest_K]] = bidders_K[highest_K]
        sold = (winner_N >= 0).nonzero().flatten()
        before = owner_N[sold]
        object_N[before[before >= 0]] = -1
        owner_N[sold] = winner_N[sold]
        object_N[winner_N[sold]] = sold
    return object_N
