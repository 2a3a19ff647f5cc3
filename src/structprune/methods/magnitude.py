"""Magnitude: product of the L2 norms of a channel's slices; no data, no weight update. A floor to measure against.

With a pattern it is |w| of single weights, over a matrix as a whole or in every group of N:M.
"""

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
    patterned=Method(
        name="magnitude",
        title="Magnitude of single weights",
        paper="folklore",
        summary="|w| of single weights; no data, no update",
        provenance="baseline",
        pipeline="elements",
        score="magnitude",
        allocator="uniform",
        solver="mask-only",
        needs_statistics=False,
        damping=1e-2,
        kinds=("attention", "mlp"),
    ),
)
