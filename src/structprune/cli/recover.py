"""`structprune recover`: a pruned model learns again from the dense one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from structprune.cli.flags import QuietFlag, ReportJsonFlag
from structprune.cli.settings import given, takes_fields
from structprune.recipe.training import RecoverySettings

if TYPE_CHECKING:
    from structprune.results.recovery import RecoveryReport


def _settings(values: dict[str, Any]) -> RecoverySettings:
    return RecoverySettings.build(**given(values))


@takes_fields(RecoverySettings.model_fields, _settings)
def recover(
    student: Annotated[str, typer.Argument(help="The pruned model: a directory that `prune` wrote, or a hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to create.")],
    teacher: Annotated[str, typer.Option(help="The dense model that it was pruned from.")],
    # RecoverySettings, from the options that `takes_fields` adds.
    settings: Any,
    as_json: ReportJsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Let the pruned model STUDENT learn again from the dense one; `structprune resume` goes on if it was cut."""
    # Only now: these load torch and transformers, and a wrong flag should not wait for that.
    from structprune.api import recover as run_recover
    from structprune.cli.interrupt import run_or_say_how_to_resume

    report = run_or_say_how_to_resume(
        lambda observer: run_recover(student, teacher, settings, output, observer), output, quiet=quiet
    )
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        recovery_table(report)


def recovery_table(report: RecoveryReport) -> None:
    """Print what a recovery did and cost."""
    from structprune.cli.tables import print_pairs
    from structprune.memory import format_bytes
    from structprune.results.summary import beginning, beside_the_weights, reload_line

    windows = sum(text.held_out_windows for text in report.texts)
    rows = [
        ("KL from the teacher", f"{report.before.divergence:.4f} -> {report.after.divergence:.4f} nats per token"),
        (
            "perplexity",
            f"{report.before.perplexity:.2f} -> {report.after.perplexity:.2f} (dense {report.dense_perplexity:.2f})",
        ),
        (
            "measured on",
            f"{windows} held-out windows of {report.seq_len} tokens, {beginning(report.start)}: {report.description}",
        ),
        ("learned from", f"{report.tokens:,} tokens, mode {report.settings['mode']}"),
    ]
    if report.blocks:
        changed = sum(block.changed for block in report.blocks)
        rows.append(("blocks", f"{changed} of {len(report.blocks)} changed, the others were met no better"))
    if len(report.texts) > 1:
        rows += [(f"share of {text.name}", f"{text.share:.1%}") for text in report.texts]
    rows += [("note", note) for note in report.notes]
    rows += [
        (
            "peak memory",
            f"planned {format_bytes(report.memory.planned_peak_bytes)}, "
            f"measured {format_bytes(report.memory.measured_peak_bytes)}",
        ),
        ("reload check", reload_line(report.reload)),
        *beside_the_weights(report.files),
        ("forward passes", f"{report.compute_dtype} on {report.device}"),
        ("time", f"training {report.train_seconds:.1f} s, the whole run {report.wall_seconds:.1f} s"),
    ]
    print_pairs(f"structprune recover {report.student} -> {report.output}", rows)
