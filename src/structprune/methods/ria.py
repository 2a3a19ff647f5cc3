"""RIA: relative importance and activations (Plug-and-Play, ICLR 2024).

A weight counts by its share of its row's and its column's sum of |w|, times |x_i|^(1/2). The paper's permutation of
channels for N:M is not part of this.
"""

from structprune.methods.method import Method

RIA = Method(
    name="ria",
    title="Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    paper="ICLR 2024",
    summary="|w| relative to its row and column, times the root of its input's norm, weights left as they are",
    provenance="read in public code",
    pipeline="elements",
    score="ria",
    allocator="uniform",
    solver="mask-only",
    needs_statistics=True,
    damping=1e-2,
    kinds=("attention", "mlp"),
)
