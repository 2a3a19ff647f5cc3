"""Magnitude: product of the L2 norms of a channel's slices; no data, no weight update. A floor to measure against."""

from structprune.methods.method import Method

MAGNITUDE = Method(
    name="magnitude",
    title="Magnitude (norm product over the group)",
    paper="folklore; groups as in arXiv 2301.12900",
    summary="product of the norms of gate, up and down slices; no data, no update, uniform",
    provenance="baseline",
    score="magnitude",
    allocator="uniform",
    solver="mask-only",
    needs_statistics=False,
)
