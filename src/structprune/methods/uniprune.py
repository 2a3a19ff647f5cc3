"""UniPruning, reduced (arXiv 2510.03291): a moving average over the windows of RIA's score with sampled sums.

With the published settings its mirror step changes nothing of that, and the weights that drift meanwhile are put back.
The training that its 2:4 results come from is not part of this: docs/elements.md.
"""

from structprune.methods.method import Method

UNIPRUNE = Method(
    name="uniprune",
    title="UniPruning, reduced to what its published settings compute",
    paper="arXiv 2510.03291",
    summary="moving average over windows of RIA with sampled sums, weights left as they are",
    provenance="derived",
    pipeline="elements",
    score="uniprune",
    allocator="uniform",
    solver="mask-only",
    needs_statistics=True,
    damping=1e-2,
    kinds=("attention", "mlp"),
)
