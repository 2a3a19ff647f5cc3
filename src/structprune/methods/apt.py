"""APT: the multiple removal problem (arXiv 2410.15567).

Its masks are by the diagonal ("S" in the paper), its update is for all that goes at once ("M"). No code
was published; blocks and damping are ours.
"""

from structprune.methods.method import Method

APT = Method(
    name="apt",
    title="Pruning Foundation Models for High Accuracy without Retraining",
    paper="arXiv 2410.15567",
    summary="w^2 over the inverse's diagonal, block after block, removed at once",
    provenance="derived",
    pipeline="elements",
    score="apt",
    allocator="uniform",
    solver="own",
    needs_statistics=True,
    damping=1e-2,
    kinds=("attention", "mlp"),
)
