"""Wanda-sp: Wanda's score (arXiv 2306.11695) summed over the rows of down_proj, no weight update.

The structured form is the baseline of FLAP's code (arXiv 2312.11983); there is no paper of its own.
"""

from structprune.methods.method import Method

WANDA_SP = Method(
    name="wanda-sp",
    title="Wanda, structured form",
    paper="arXiv 2306.11695; structured form from the code of arXiv 2312.11983",
    summary="Wanda column score, weights left as they are, uniform",
    provenance="read in public code",
    score="wanda",
    allocator="uniform",
    solver="mask-only",
    needs_statistics=True,
    kinds=("attention", "mlp"),
)
