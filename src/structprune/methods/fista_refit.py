"""FISTAPruner as we would have it: inputs of unit energy, and a least-squares refit on the mask behind the rounding.

The paper (arXiv 2408.03728) has neither as far as is known; `fistapruner` is nearer to it.
"""

from structprune.methods.method import Method

FISTA_REFIT = Method(
    name="fista-refit",
    title="FISTAPruner in unit coordinates, with a refit",
    paper="variant of arXiv 2408.03728, ours",
    summary="l1 penalty by FISTA with inputs of unit energy, rounded, least squares on the mask",
    provenance="derived",
    pipeline="elements",
    score="fista-unit",
    allocator="uniform",
    solver="own",
    needs_statistics=True,
    damping="auto",
    kinds=("attention", "mlp"),
)
