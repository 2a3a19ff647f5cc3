"""Bytes that ranks exchange for one block, from shapes: what `Group.counted` counts (engine/ranks/group.py).

They do not depend on the number of ranks or of tokens: sums have the shape of what is summed, and every rank gives each
of them once to the reduction. The tests compare the figures with what was counted.

Letters: I consumer inputs, D hidden size, K kept inputs, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from structprune.statistics.gram import NUM_STRIPS
from structprune.types import UnitGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Bytes per rank, without the messages of some kilobytes around the tensors."""

    sums: int
    """Given to reductions, whose result one rank gets."""
    tensors: int
    """Sent by one rank to all."""

    def __add__(self, other: Exchange) -> Exchange:
        return Exchange(sums=self.sums + other.sums, tensors=self.tensors + other.tensors)


NOTHING = Exchange(sums=0, tensors=0)


def gram_bytes(order: int) -> int:
    """Return the bytes of one Gram's upper strips in float32, the float64 sum of the inputs and the token count."""
    strip = max(1, -(-order // NUM_STRIPS))
    rows = ((start, min(strip, order - start)) for start in range(0, order, strip))
    return sum(count * (order - start) for start, count in rows) * 4 + order * 8 + 8


def pruning_exchange(
    groups: Sequence[UnitGroup],
    kept: Mapping[str, int],
    hidden: int,
    stored_item: int,
    *,
    parts: int,
    follows_dense: bool,
) -> Exchange:
    """Return the bytes exchanged for one block of the pruning pass: Grams in, kept units and consumers out.

    `kept`: kind -> units to keep; `parts`: sums kept apart, 2 where windows are held out, else 1; `stored_item`: bytes
    of a weight. Neither an iterative solver, an added bias nor a second measurement of costs is counted.
    """
    total = NOTHING
    for group in groups:
        inputs, num_keep = group.num_units * group.width, kept[group.kind]
        # The residual's energy and its tokens are float64 numbers, and so is the target's energy.
        sums = gram_bytes(inputs) + 16 + (inputs * hidden * 4 + 8 if follows_dense else 0)
        tensors = num_keep * 8 + num_keep * group.width * hidden * stored_item
        total += Exchange(sums=parts * sums, tensors=tensors)
    return total


def sensitivity_exchange(groups: Sequence[UnitGroup], hidden: int) -> Exchange:
    """Return the bytes of one block of the sensitivity pass: Grams and sensitivities in, the latter and costs out."""
    kinds = {group.kind: group for group in groups}
    sums = sum(gram_bytes(group.num_units * group.width) for group in groups) + len(kinds) * gram_bytes(hidden)
    # Prices are float64; each kind's parts add theirs up.
    tensors = sum(hidden**2 * 4 + group.num_units * 8 for group in kinds.values())
    return Exchange(sums=sums, tensors=tensors)
