"""Bytes on the host of the phases in which single weights are pruned."""

from __future__ import annotations

from structprune.engine.planning.elements import Beside, element_phases
from structprune.engine.planning.sizes import HostSizes
from structprune.phases import PhaseBytes


def host_element_phases(sizes: HostSizes) -> PhaseBytes:
    """Plan the peaks on the host, beside the block as it is stored and as it runs."""
    request = sizes.request
    beside = Beside(
        block=sizes.pruning + sizes.weights + sizes.cast,
        again=sizes.weights + sizes.cast if request.follows_dense else 0,
        activations=sizes.activations,
        tokens=sizes.micro_batch_tokens,
        item=sizes.item,
    )
    return element_phases(request.elements[frozenset(sizes.block.shapes)], beside)
