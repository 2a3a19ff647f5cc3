"""What went in a run, in words: parameters of the scope, or single weights that are zero now."""

from __future__ import annotations

from structprune.kinds import SCOPES
from structprune.results.schema import PruneFacts


def removed_rows(report: PruneFacts) -> list[tuple[str, str]]:
    """Say what went: parameters of the scope, the blocks and the model, or weights that are zero now."""
    size, zeros = report.size, report.zeros
    if zeros is not None:
        return [
            (
                f"zeros in {report.recipe.scope}",
                f"{zeros.share:.2%} of its weights (asked {zeros.asked:.2%}), pattern {zeros.pattern}",
            ),
            ("parameters that are not zero", f"{size.parameters_before:,} -> {zeros.nonzero_parameters:,}"),
        ]
    predicted = report.predicted_loss
    in_scope = (
        f"removed of {report.recipe.scope}",
        f"{size.removed_share_of_scope:.2%} of its parameters ({asked(report)})",
    )
    return [
        *([in_scope] if SCOPES[report.recipe.scope] else []),
        *([] if predicted is None else [("predicted loss", f"{predicted:.4f} nats per token")]),
        *((f"limit of {limit.name}", limit.line) for limit in report.limits),
        ("removed of the blocks", f"{size.removed_share_of_blocks:.2%}"),
        ("removed of the model", f"{size.removed_share_of_model:.2%}"),
    ]


def asked(report: PruneFacts) -> str:
    """Say which share was asked for, or that limits decided."""
    return "as its limits need" if report.limits else f"asked {report.recipe.sparsity:.2%}"
