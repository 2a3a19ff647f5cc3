"""What the model card says of a model whose matrices have zeros: how many, where, and what they are good for."""

from __future__ import annotations

from collections.abc import Sequence

from structprune.patterns import as_pattern
from structprune.results.schema import BlockReport
from structprune.results.sizes import ZerosReport


def introduction(zeros: ZerosReport) -> str:
    """Say in a clause what was done."""
    return (
        f"with zeros in the matrices of its blocks, pattern {zeros.pattern}: {zeros.share:.1%} of their weights, which "
        f"leaves {zeros.nonzero_parameters:,} parameters that are not zero"
    )


def description(zeros: ZerosReport, blocks: Sequence[BlockReport]) -> str:
    """List the share of zeros of each map over the blocks, and say plainly what gets faster and what does not."""
    lines: list[str] = []
    for kind in dict.fromkeys(block.kind for block in blocks):
        shares = [1 - block.kept_units / block.num_units for block in blocks if block.kind == kind]
        low, high = min(shares), max(shares)
        shown = f"{low:.2%}" if high - low < 5e-5 else f"{low:.2%} to {high:.2%}"
        lines.append(f"- {kind}: {shown} zeros in {len(shares)} blocks")
    faster = as_pattern(zeros.pattern, zeros.asked, "layer").runs_faster
    return (
        "\n".join(lines)
        + "\n\nThe zeros are stored like other numbers, exactly 0: the model loads everywhere as it is, and as it is "
        "it is neither smaller nor faster, but for files that compress better. "
        + faster
        + " Embeddings, head, norms, biases and routers have none. Training the weights further fills the zeros again "
        "unless the mask is kept."
    )
