"""SPAP: structured pruning by alternating optimisation and a penalty method (arXiv 2505.03373).

The decision is a mixed-integer problem, relaxed by a penalty on the columns that are to go; then consumer and up are
updated in turn, the gate frozen, and kept where held-out windows are met better. The paper's full text and code were
not to be had: formulation, schedule and steps are reconstructed from its abstract (docs/methods.md).
"""

from structprune.methods.method import Method

SPAP = Method(
    name="spap",
    title="SPAP: Structured Pruning via Alternating Optimization and Penalty Methods",
    paper="arXiv 2505.03373",
    summary="penalty method for the mask, alternating least squares and conjugate gradients, uniform",
    provenance="reconstructed",
    score="penalty",
    allocator="uniform",
    solver="alternating",
    needs_statistics=True,
    damping="auto",
)
