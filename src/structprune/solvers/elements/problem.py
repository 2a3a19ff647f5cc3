"""One linear map that is to have zeros, as a pruner sees it, and its answer.

    min over V with zeros where the pattern wants them of  sum over tokens |V x - y|^2

y is W x (local), or on the dense path what the dense model's own input makes of W. Rows of V do not depend on one
another once their masks are known.

Shape suffixes: I inputs, O outputs, N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from structprune.patterns import Pattern
from structprune.types import Moments

Reads = Literal["energy", "mean", "gram"]
"""What is summed of a map's inputs: their squares, they themselves, or the products of all pairs."""


@dataclass(slots=True, kw_only=True)
class SharedFactor:
    """A factor of the Gram matrix, made for the first of several maps that read one tensor and kept for the others."""

    factor_II: Tensor | None = None
    damping: float = 0.0
    """The ridge that it was asked for with."""
    raised: bool = False
    """Whether that had to be raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseProblem:
    """A weight, the pattern, and sums over the calibration tokens of the map's inputs x.

    In `moments`, `sum_I` is there where something reads means; `target_OI` is the sum of y x^T and `target_energy` that
    of |y|^2; both None for the local target. Where a method reads energies only, the Gram is a diagonal matrix.
    """

    weight_OI: Tensor
    pattern: Pattern
    moments: Moments
    damping: float
    """Ridge, as a share of each input's own energy."""
    energy_NI: Tensor | None = None
    """Mean square of each input in every window, float32; None where it was not taken."""
    seed: int = 0
    shared: SharedFactor | None = None
    """Where a factor is kept for other maps; None: for this one alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseSolution:
    """A weight with zeros, and how it was found."""

    weight_OI: Tensor
    """Float32 or wider; +0.0 where nothing stays."""
    keep_OI: Tensor
    """Bool: what stays."""
    status: Literal["ok", "damping-raised"] = "ok"
    statistics: Mapping[str, float] = field(default_factory=dict[str, float])


def nothing_shared(inputs: int) -> int:
    """Return 0: nothing stays."""
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruner:
    """One way to decide which weights of a matrix stay."""

    prune: Callable[[SparseProblem], SparseSolution]
    reads: Set[Reads]
    """What has to be summed for it; nothing where the weights alone decide."""
    workspace: Callable[[int, int], int]
    """(inputs, outputs) -> bytes that it holds at most, beside the sums, the weight as it is stored and, on the dense
    path, the weight that is wanted."""
    shares: Callable[[int], int] = nothing_shared
    """Inputs -> bytes of `workspace` that stay for the other maps of the same input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One way to set the weights that stay once a pruner has chosen them."""

    solve: Callable[[SparseProblem, SparseSolution], SparseSolution]
    reads: Set[Reads]
    workspace: Callable[[int, int], int]
    """(inputs, outputs) -> bytes that it holds at most, beside the sums, the weight and the pruner's answer."""
    shares: Callable[[int], int] = nothing_shared
    """Inputs -> bytes of `workspace` that stay for the other maps of the same input."""
