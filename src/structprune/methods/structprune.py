"""StructPrune: global structured pruning split into block-sized problems (arXiv 2510.03246).

A sensitivity pass of the dense model gives every removal a cost in units of the loss; one Lagrangian threshold on
cost per parameter sets all widths at once; then each block is solved in order against the dense model's residual
stream. What is published, what was read in the authors' code and what is derived here: docs/methods/structprune.md.
"""

from structprune.methods.method import Method, SensitivityKind

STRUCTPRUNE = Method(
    name="structprune",
    title="StructPrune: Structured Global Pruning",
    paper="arXiv 2510.03246",
    summary="loss-based greedy removal, closed-form threshold across blocks, least squares on the dense path",
    provenance="derived",
    score="greedy",
    allocator="closed-form",
    solver="least-squares",
    needs_statistics=True,
    sensitivity=SensitivityKind.LOSS,
    target="dense-path",
    damping="auto",
    shrinkage=0.3,
    kinds=("attention", "mlp"),
)
