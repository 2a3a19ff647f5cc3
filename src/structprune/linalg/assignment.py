"""The assignment of persons to objects of most value, through scipy.

Shape suffixes: N persons, objects.
"""

from __future__ import annotations

import torch
from torch import Tensor

PACKAGES, EXTRA = ("scipy",), "structprune[milp]"


def best_assignment(value_NN: Tensor) -> Tensor:
    """Find the object of every person so that the sum of their values is most: (N,), each object once."""
    from scipy.optimize import linear_sum_assignment

    _, object_N = linear_sum_assignment(value_NN.cpu().double().numpy(), maximize=True)
    return torch.from_numpy(object_N)
