"""Depth: whole decoder blocks go; the output is the same stock architecture with fewer of them.

By default the n consecutive blocks over which the residual stream turns least are left out ("The Unreasonable
Ineffectiveness of the Deeper Layers", arXiv 2403.17887; with n = 1 a relative of ShortGPT's block influence, arXiv
2403.03853). `--score measured-loss` removes one block after the other, each time the one whose absence costs the loss
least. Nothing is healed afterwards: the paper's recovery training is not part of this. Formulas and what differs from
the papers: docs/methods/depth.md.
"""

from structprune.methods.method import Method

DEPTH = Method(
    name="depth",
    title="Removal of whole blocks: The Unreasonable Ineffectiveness of the Deeper Layers",
    paper="arXiv 2403.17887",
    summary="whole blocks by angular distance or measured loss; a smaller num_hidden_layers, weights left as they are",
    provenance="published formula",
    score="angular",
    allocator="uniform",
    solver="mask-only",
    needs_statistics=True,
    kinds=("attention", "mlp"),
    pipeline="depth",
)
