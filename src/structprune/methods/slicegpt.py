"""SliceGPT: delete rows and columns (arXiv 2401.15024).

The norms' weights are folded into the maps behind them; what is left commutes with rotations. At every position of the
residual stream the signal is rotated to its principal directions and the last ones are dropped, in order, each measured
on the signal that the cuts before it leave. Where two positions have different bases the residual sum goes through a
small shortcut matrix (`--structure per-layer`); with one basis for all it does not (`--structure uniform`, derived
here). docs/methods/slicegpt.md says which part is whose.
"""

from structprune.methods.method import Method

SLICEGPT = Method(
    name="slicegpt",
    title="SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
    paper="arXiv 2401.15024",
    summary="principal directions of the residual stream, one smaller hidden size, shortcut matrices",
    provenance="read in public code",
    pipeline="slice",
    needs_statistics=True,
    damping=0.01,
    kinds=("attention", "mlp"),
)
