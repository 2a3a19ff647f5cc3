"""Thanos: block after block, all that goes of a row at once (arXiv 2504.05346).

What goes of a block is what Wanda's score on all remaining inputs says. Without the paper's outlier rows, which stay
dense and break N:M.
"""

from structprune.methods.method import Method

THANOS = Method(
    name="thanos",
    title="Thanos: A Block-wise Pruning Algorithm for Efficient Large Language Model Compression",
    paper="arXiv 2504.05346",
    summary="Wanda's score on what is left, block after block, removed at once",
    provenance="read in public code",
    pipeline="elements",
    score="thanos",
    allocator="uniform",
    solver="own",
    needs_statistics=True,
    damping=1e-2,
    kinds=("attention", "mlp"),
)
