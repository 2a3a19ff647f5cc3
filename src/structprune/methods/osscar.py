"""OSSCAR: greedy structured removal by optimal brain surgeon, then local search over exchanges (arXiv 2403.12983).

One-shot and layer by layer on the squared output error, uniform widths, the consumer re-solved on what is left, all in
float64. The exchanges are our own search (linalg/obs.py), which ends in a local optimum for single exchanges.
"""

from structprune.methods.method import Method

OSSCAR = Method(
    name="osscar",
    title="OSSCAR: One-Shot Structured Pruning with Combinatorial Optimization",
    paper="arXiv 2403.12983",
    summary="greedy removal with exact updates, exchanges, least squares, uniform",
    provenance="read in public code",
    score="greedy-swap",
    allocator="uniform",
    solver="least-squares",
    needs_statistics=True,
    damping="auto",
    kinds=("attention", "mlp"),
)
