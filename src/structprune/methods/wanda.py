"""Wanda: a weight counts by |w_oi| |x_i|, the norm over the calibration tokens (arXiv 2306.11695).

Every row loses the same number, or every group of N:M; no weight is changed. The structured form is `wanda-sp`.
"""

from structprune.methods.method import Method

WANDA = Method(
    name="wanda",
    title="A Simple and Effective Pruning Approach for Large Language Models",
    paper="arXiv 2306.11695",
    summary="|w| times the norm of its input, the same count in every row, weights left as they are",
    provenance="read in public code",
    pipeline="elements",
    score="wanda",
    allocator="uniform",
    solver="mask-only",
    counts="row",
    needs_statistics=True,
    damping=1e-2,
    kinds=("attention", "mlp"),
)
