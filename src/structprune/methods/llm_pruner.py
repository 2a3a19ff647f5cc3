"""LLM-Pruner: on the structural pruning of large language models (arXiv 2305.11627).

Units are ranked by a Taylor expansion of the loss on the calibration text: |w g| summed over all weights that leave
with the unit. The first and last blocks are left alone: blocks 4 to 29 of LLaMA-7B's 32 are pruned, so an eighth and a
sixteenth are protected. No weight is updated; the authors recover with LoRA afterwards. Their code differentiates the
whole model at once; here one block is in memory at a time. The other variants are other scores (`taylor-vector`,
`taylor-second`, `taylor-mix`), one ranking for all blocks is the allocator `closed-form`: docs/methods/llm-pruner.md.
"""

from structprune.methods.method import Method, SensitivityKind

LLM_PRUNER = Method(
    name="llm-pruner",
    title="LLM-Pruner: On the Structural Pruning of Large Language Models",
    paper="arXiv 2305.11627",
    summary="Taylor importance of the coupled weights by a streamed backward pass, middle blocks, no update, uniform",
    provenance="read in public code",
    score="taylor-first",
    allocator="uniform",
    solver="mask-only",
    needs_statistics=False,
    sensitivity=SensitivityKind.TAYLOR,
    protect=(1 / 8, 1 / 16),
    kinds=("attention", "mlp"),
)
