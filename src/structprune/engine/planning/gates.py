"""Bytes of gates that learn which units stay, on the host and on a device with memory of its own, from shapes."""

from __future__ import annotations

from structprune.engine.planning.plan import PlanRequest
from structprune.engine.planning.shapes import divergence_bytes, gram_bytes, kept_for_backward
from structprune.engine.planning.sizes import CHUNK_BYTES, HostSizes
from structprune.phases import Phase, PhaseBytes
from structprune.types import BlockLayout, UnitGroup


def gate_phases(sizes: HostSizes, embed: int) -> PhaseBytes:
    """Plan learning which units stay: the pass that measures the start, and steps of one window as in a repair.

    The model that learns is the dense one, and what learns is a number per unit; what stands in for units is a matrix.
    """
    request, block = sizes.request, sizes.block
    if request.gates is None:
        return {}
    window = request.seq_len * sizes.hidden * sizes.item
    beside = sizes.stores_closed
    if sizes.choice.store == "memory":
        beside += (2 * request.num_windows + len(request.layout.blocks)) * window
    divergence = divergence_bytes(request.layout.vocab_size, request.compute_dtype)
    step = request.seq_len * sizes.hidden * 4 + 2 * window
    learning = sizes.weights + sizes.cast + kept_for_backward(request, block) + sizes.widened + _gated_bytes(request)
    # Both models' heads are read, and found to be the same.
    steps = beside + sizes.head + max(max(divergence, learning) + step, sizes.head) + CHUNK_BYTES
    sums = sum(gram_bytes(group) for group in request.groups)
    start = sizes.stores_open + sizes.weights + sizes.cast + sizes.activations + sums
    return {
        Phase.EMBED: max(embed, beside + sizes.embeddings + CHUNK_BYTES + 2 * window),
        Phase.GATES: max(steps, start),
    }


def gate_device_bytes(request: PlanRequest, block: BlockLayout, weights: int, head: int) -> int:
    """Return the bytes of both models' heads, of one window, and of a block with gates or what is compared."""
    window = request.seq_len * request.layout.hidden_size
    moving = 3 * window * (request.compute_dtype.itemsize + 4)
    learning = weights + kept_for_backward(request, block) + _gated_bytes(request)
    return 2 * head + moving + max(learning, divergence_bytes(request.layout.vocab_size, request.compute_dtype))


def gate_disk_bytes(sizes: HostSizes) -> int:
    """Return the bytes of the stand-ins of all blocks, and of states that do not stay in memory."""
    request = sizes.request
    if request.gates is None:
        return 0
    num_blocks = len(request.layout.blocks)
    total = num_blocks * sum(_stand_in_bytes(group) for group in request.groups)
    if sizes.choice.store == "file":
        total += (3 * request.num_windows + num_blocks) * request.seq_len * sizes.hidden * sizes.item
    return total


def _stand_in_bytes(group: UnitGroup) -> int:
    """Return the bytes of what predicts some of a consumer's inputs from the others, at most, in float32."""
    return (group.num_units * group.width) ** 2 // 4 * 4


def _gated_bytes(request: PlanRequest) -> int:
    """Return the bytes of gates in a block: stand-ins as they are read and used, and one window's inputs.

    Of these there are in float32 the gated ones and what is missing, each with its gradient.
    """
    inputs = max(group.num_units * group.width for group in request.groups)
    matrices = sum(2 * _stand_in_bytes(group) for group in request.groups)
    return matrices + 4 * request.seq_len * inputs * 4
