"""REAP: whole experts of a mixture go (arXiv 2510.13999), the output is the same stock architecture with fewer of them.

Of expert j the saliency is the mean, over the tokens that the router sends to it, of the router's weight times the norm
of the expert's output: S_j = mean over x in X_j of g_j(x) |f_j(x)|. In every block the experts of the least saliency go
with their rows of the router, whose softmax then runs over those that are left. No weight is changed. What differs from
the paper: docs/methods/reap.md.
"""

from structprune.methods.method import Method

REAP = Method(
    name="reap",
    title="REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
    paper="arXiv 2510.13999",
    summary="whole experts of a mixture by router-weighted activation, weights left as they are, uniform",
    provenance="published formula",
    score="router-weighted",
    allocator="uniform",
    solver="mask-only",
    needs_statistics=True,
    kinds=("mlp",),
    pipeline="experts",
)
