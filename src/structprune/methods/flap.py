"""FLAP: fluctuation-based adaptive structured pruning (arXiv 2312.11983).

A unit whose activation hardly varies can be replaced by its mean. Scores are variances times squared column norms;
brought to mean zero and deviation one per block and kind, they are cut at one threshold over the whole model; what the
removed units give on average is added to the output's bias. Here the budget counts each unit's real parameters, and
each block's units are chosen on the pruned model's stream, where the authors' code chooses all on the dense one.
"""

from structprune.methods.method import Method

FLAP = Method(
    name="flap",
    title="FLAP: Fluctuation-based Adaptive Structured Pruning",
    paper="arXiv 2312.11983",
    summary="fluctuation score, standardised across blocks, bias compensation",
    provenance="read in public code",
    score="fluctuation",
    allocator="standardised",
    solver="bias",
    needs_statistics=True,
    kinds=("attention", "mlp"),
)
