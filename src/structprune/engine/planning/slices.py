"""Bytes of the phases of the slicing pipeline that the common ones do not bound, from shapes."""

from __future__ import annotations

from structprune.phases import Phase, PhaseBytes

# What the reader copies at once, and the pipeline rotates at once.
_CHUNK_BYTES = 16 * 2**20


def slice_phases(
    *,
    hidden: int,
    width: int,
    item: int,
    several: bool,
    buffered: bool,
    stream: int,
    outside: int,
    weights: int,
    cast: int,
    activations: int,
    batch_tokens: int,
    largest_outer: int,
) -> PhaseBytes:
    """Phase -> peak bytes.

    `hidden` dimensions become `width`, with `several` bases or one; `item` bytes per number of the forward passes.
    The stores are files, whose windows are read into buffers, where it is `buffered`.
    `stream` is what is held beside a block while the stores are open and `outside` what is held when they are closed,
    `weights` and `cast` the block, `largest_outer` the largest tensor outside the blocks, all in bytes.
    """
    square = hidden * hidden
    basis = hidden * width * 8
    # Those before and after the block and between its sublayers, and the one at work in the forward passes' dtype.
    bases = (3 if several else 1) * basis + hidden * width * item
    states = batch_tokens * hidden
    # Of a micro-batch: the cut one, its coordinates, the buffer; float32 needs no copy, but for the directions.
    batch = states * ((2 + buffered) * item + (0 if item == 4 and several else 4))
    # Shifted Gram and eigenvectors, the library's copy of either, its workspace of two squares; sorted, signed, chosen.
    eigen = 6 * square * 8 + 3 * basis
    # A row chunk in float64, scaled basis, product; what is written beside what was read.
    chunk = 3 * _CHUNK_BYTES + basis
    growth = 2 * width * width * (8 + 4) if several else 0
    phases: PhaseBytes = {
        # The basis behind the block comes when its sums are gone.
        Phase.SLICE_STATISTICS: stream + weights + cast + activations + square * 4 + bases - basis * several + batch,
        Phase.SLICE_EIGENVECTORS: stream + weights + cast + square * 4 + bases + eigen,
        Phase.ROTATE_BLOCK: stream + 2 * weights + cast + bases + chunk + growth,
        Phase.ROTATE_EMBEDDINGS: stream + largest_outer + 2 * _CHUNK_BYTES + bases + chunk,
        Phase.ROTATE_HEAD: outside + largest_outer + 2 * _CHUNK_BYTES + bases + chunk,
    }
    if not several:
        # The sum over the positions.
        phases[Phase.SLICE_STATISTICS] += square * 8
        phases[Phase.SLICE_EIGENVECTORS] += square * 8
    return phases
