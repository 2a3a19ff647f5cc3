"""FISTAPruner: an l1 penalty by FISTA, rounded to the pattern (arXiv 2408.03728), from SparseGPT's answer.

No code was published. As published but for the search of the penalty, which is on a logarithmic scale here.
"""

from structprune.methods.method import Method

FISTAPRUNER = Method(
    name="fistapruner",
    title="A Convex-optimization-based Layer-wise Post-training Pruner for Large Language Models",
    paper="arXiv 2408.03728",
    summary="l1 penalty by FISTA from SparseGPT's answer, rounded",
    provenance="derived",
    pipeline="elements",
    score="fista",
    allocator="uniform",
    solver="own",
    needs_statistics=True,
    damping=1e-2,
    kinds=("attention", "mlp"),
)
