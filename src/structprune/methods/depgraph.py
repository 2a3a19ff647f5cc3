"""DepGraph: towards any structural pruning (arXiv 2301.12900).

All parameters that shrink together are one group, and a unit's importance is the sum over its group of the squared
norms of its slices; no data, no weight update. The groups of decoders are those that every method here has. Models of
other kinds, whose groups are found in their graph, have a command of their own, `structprune prune-module`. The paper's
training with growing group penalties is not part of either: docs/methods/depgraph.md.
"""

from structprune.methods.method import Method

DEPGRAPH = Method(
    name="depgraph",
    title="DepGraph: Towards Any Structural Pruning",
    paper="arXiv 2301.12900",
    summary="sum of squared norms over the group; no data, no update, uniform",
    provenance="published formula",
    score="group-norm",
    allocator="uniform",
    solver="mask-only",
    needs_statistics=False,
    kinds=("attention", "mlp"),
)
