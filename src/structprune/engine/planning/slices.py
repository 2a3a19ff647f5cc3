"""Bytes of the phases of the slicing pipeline that the common ones do not bound, from shapes."""

from __future__ import annotations

from dataclasses import dataclass

from structprune.engine.planning.plan import PlanRequest
from structprune.phases import Phase, PhaseBytes

# What the reader copies at once, and the pipeline rotates at once.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceMemory:
    """What host or device holds beside the bases while the stream is cut, in bytes where nothing else is said."""

    micro_batch: int
    """Windows that are computed at once."""
    buffered: bool
    """Whether windows are read into buffers: the stores are files, or elsewhere."""
    stores_open: int
    """All that is held beside a block while the windows' states are kept."""
    stores_closed: int
    """All that is held beside a block once they are not."""
    weights: int
    """The block as it is stored."""
    cast: int
    """The block's tensors that are cast, or its cut successor."""
    activations: int
    largest_outer: int
    """The largest tensor outside the blocks."""


def slice_phases(request: PlanRequest, memory: SliceMemory) -> PhaseBytes:
    """Plan each phase's peak bytes where the stream's `hidden` dimensions become `width`, with several bases or one."""
    hidden, width, item = request.layout.hidden_size, request.sliced_hidden, request.compute_dtype.itemsize
    several = request.slices == "bases"
    square = hidden * hidden
    basis = hidden * width * 8
    # Those before and after the block and between its sublayers, and the one at work in the forward passes' dtype.
    bases = (3 if several else 1) * basis + hidden * width * item
    states = memory.micro_batch * request.seq_len * hidden
    # Of a micro-batch: the cut one, its coordinates, the buffer; float32 needs no copy, but for the directions.
    batch = states * ((2 + memory.buffered) * item + (0 if item == 4 and several else 4))
    # Shifted Gram and eigenvectors, the library's copy of either, its workspace of two squares; sorted, signed, chosen.
    eigen = 6 * square * 8 + 3 * basis
    # One basis has the sum over the positions in float64 beside that of one.
    sums = square * (4 if several else 4 + 8)
    # A row chunk in float64, scaled basis, product; what is written beside what was read.
    chunk = 3 * _CHUNK_BYTES + basis
    growth = 2 * width * width * (8 + 4) if several else 0
    block = memory.stores_open + memory.weights + memory.cast + bases
    outer = memory.largest_outer + 2 * _CHUNK_BYTES + bases + chunk
    return {
        # The basis behind the block comes when its sums are gone.
        Phase.SLICE_STATISTICS: block + memory.activations + sums - basis * several + batch,
        Phase.SLICE_EIGENVECTORS: block + sums + eigen,
        Phase.ROTATE_BLOCK: block + memory.weights + chunk + growth,
        Phase.ROTATE_EMBEDDINGS: memory.stores_open + outer,
        Phase.ROTATE_HEAD: memory.stores_closed + outer,
    }
