"""SparseGPT: optimal brain surgeon, column after column (arXiv 2301.00774).

In every block of 128 inputs the weights of least w^2 / U_jj^2 go, and the inputs behind them make up for it. The ridge
is a share of each input's own energy here, where the paper has the mean energy.
"""

from structprune.methods.method import Method

SPARSEGPT = Method(
    name="sparsegpt",
    title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    paper="arXiv 2301.00774",
    summary="optimal brain surgeon column after column, in blocks of 128",
    provenance="read in public code",
    pipeline="elements",
    score="sparsegpt",
    allocator="uniform",
    solver="own",
    needs_statistics=True,
    damping=1e-2,
    kinds=("attention", "mlp"),
)
