"""ALPS: mask and weights of a matrix together, by ADMM on the layer's error (arXiv 2406.07831).

Then conjugate gradients on the mask. The ridge is chosen on held-out windows, as a share of each input's own energy;
the paper's is 0.01 of the mean energy.
"""

from structprune.methods.method import Method

ALPS = Method(
    name="alps",
    title="ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
    paper="arXiv 2406.07831",
    summary="mask and weights together by ADMM, then conjugate gradients on the mask",
    provenance="read in public code",
    pipeline="elements",
    score="alps",
    allocator="uniform",
    solver="own",
    needs_statistics=True,
    damping="auto",
    kinds=("attention", "mlp"),
)
